"""What is kept for the backward pass: everything, the results of products, or inputs of layers."""

from __future__ import annotations

import functools
from typing import Any

from torch.utils.checkpoint import create_selective_checkpoint_contexts

from vlbench.compat.torch_internals import expensive_operations
from vlbench.compat.transformers_internals import set_activation_checkpointing

CHECKPOINTING_MODES = ("none", "selective", "full")
"""From most memory to least: keep all; keep what matrix products and attention give and compute
norms, rotations and activations again; keep the inputs of layers alone."""


def enable_activation_checkpointing(language: Any, visual: Any, mode: str) -> bool:
    """Set what decoder layers and tower blocks keep; tell whether anything is computed again.

    A tower knows all or nothing: it is recomputed in full unless `how` is "none".
    """
    again = mode != "none"
    visual.set_grad_checkpointing(again)
    if not again:
        set_activation_checkpointing(language, None)
        return False
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(
            create_selective_checkpoint_contexts, expensive_operations()
        )
    set_activation_checkpointing(language, options)
    return True
