"""What is kept for the backward pass: everything, the results of products, or inputs of layers."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

CHECKPOINTING_MODES = ("none", "selective", "full")
"""From most memory to least: keep all; keep what matrix products and attention give and compute
norms, rotations and activations again; keep the inputs of layers alone."""
MATMUL_OPS = ("mm", "addmm", "bmm", "baddbmm")
ATTENTION_OPS = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)


def enable_activation_checkpointing(language: Any, visual: Any, mode: str) -> bool:
    """Set what decoder layers and tower blocks keep; tell whether anything is computed again.

    A tower knows all or nothing: it is recomputed in full unless `how` is "none".
    """
    again = mode != "none"
    visual.set_grad_checkpointing(again)
    if not again:
        off = getattr(language, "activation_checkpointing_disable", None)
        (off or language.gradient_checkpointing_disable)()
        return False
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(
            create_selective_checkpoint_contexts, saved_operations()
        )
    new = getattr(language, "activation_checkpointing_enable", None)  # its name in transformers 6
    (new or language.gradient_checkpointing_enable)(options)
    return True


def saved_operations() -> list[Any]:
    """Return the operations whose results are kept: those that cost the most to repeat."""
    found = [getattr(torch.ops.aten, name).default for name in MATMUL_OPS]
    found += [
        getattr(torch.ops.aten, name).default
        for name in ATTENTION_OPS
        if hasattr(torch.ops.aten, name)
    ]
    varlen = getattr(torch.ops, "torch_attn", None)
    if varlen is not None and hasattr(varlen, "_varlen_attn"):
        found.append(varlen._varlen_attn.default)
    return found
