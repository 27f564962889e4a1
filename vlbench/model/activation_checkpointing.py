"""Activation checkpointing: what is kept for the backward pass, and what is recomputed.

Only the `forward` of a block is recomputed, so its hooks (of connectors that inject, of FSDP) run
once. torch.compile is given that same `forward`: the policy is then part of what it traces, and
decides what a compiled block keeps. Around a compiled block it would meet no operation that it
knows, and keep nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from vlbench.compat.torch_internals import expensive_operations
from vlbench.model.supervised_mlp import LAST_LAYER, layer_forward

CHECKPOINTING_MODES = ("none", "selective", "full")
"""From most memory to least: keep all activations; keep the results of matrix products and of
attention and recompute norms, rotations and activation functions; keep only the inputs of
layers."""

WEIGHT_CAST = "cast_weights"
"""Attribute of a block whose weights are not of the type that it computes in without autocast: a
context manager in which they are."""


def checkpoint_blocks(
    decoder_layers: Sequence[nn.Module], encoder_blocks: Iterable[nn.Module], mode: str
) -> None:
    """Set what decoder layers and encoder blocks recompute, one of `CHECKPOINTING_MODES`.

    An encoder block keeps all or nothing: it is recomputed in full unless `mode` is "none".
    """
    language_forward = {
        "none": _class_forward,
        "selective": _selective_forward,
        "full": _recomputed_forward,
    }[mode]
    for block in decoder_layers:
        _set_forward(block, language_forward)
        setattr(block, LAST_LAYER, block is decoder_layers[-1])
    for block in encoder_blocks:
        _set_forward(block, None if mode == "none" else _recomputed_forward)


def _set_forward(block: nn.Module, forward: Any | None) -> None:
    """Give a block another `forward`; None: that of its class."""
    vars(block).pop("forward", None)
    if forward is not None:
        # a method, so that copies of the block can have it as theirs
        block.forward = MethodType(forward, block)


def _recomputed_forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Forward of a block that keeps its inputs alone."""
    if not torch.is_grad_enabled():
        return _class_forward(block, *args, **kwargs)
    return checkpoint(
        functools.partial(_class_forward, block, **kwargs), *args, use_reentrant=False
    )


def _selective_forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Forward of a block that keeps its inputs and the results of expensive operations."""
    if not torch.is_grad_enabled():
        return _class_forward(block, *args, **kwargs)
    return checkpoint(
        functools.partial(_class_forward, block, **kwargs),
        *args,
        use_reentrant=False,
        context_fn=_selective_contexts,
    )


def _class_forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Forward of the class of a block; where it is recomputed no hook has cast its weights."""
    forward = layer_forward(block, kwargs)
    cast_weights = vars(block).get(WEIGHT_CAST)
    if cast_weights is None or torch.is_autocast_enabled(args[0].device.type):
        return forward(*args, **kwargs)
    with cast_weights():
        return forward(*args, **kwargs)


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(expensive_operations())
