"""Activation checkpointing: what is kept for the backward pass, and what is recomputed."""

from __future__ import annotations

import functools
from typing import Any

from torch.utils.checkpoint import create_selective_checkpoint_contexts

from vlbench.compat.torch_internals import expensive_operations
from vlbench.compat.transformers_internals import set_activation_checkpointing

CHECKPOINTING_MODES = ("none", "selective", "full")
"""From most memory to least: keep all activations; keep the results of matrix products and of
attention and recompute norms, rotations and activation functions; keep only the inputs of
layers."""


def enable_activation_checkpointing(language: Any, visual: Any, mode: str) -> bool:
    """Set what decoder layers and encoder blocks keep; return whether anything is recomputed.

    A vision encoder keeps all or nothing: it is recomputed in full unless `mode` is "none".
    """
    is_recomputed = mode != "none"
    visual.set_grad_checkpointing(is_recomputed)
    if not is_recomputed:
        set_activation_checkpointing(language, None)
        return False
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(
            create_selective_checkpoint_contexts, expensive_operations()
        )
    set_activation_checkpointing(language, options)
    return True
