"""torch.compile of decoder layers and vision encoder blocks, block by block, for any row length.

Only `forward` is compiled: the hooks of a block (of connectors that inject, of FSDP) stay outside,
so that all blocks share a few graphs and the names of weights do not change.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vlbench.compat.torch_internals import compiler_settings
from vlbench.model.supervised_mlp import POSITIONS
from vlbench.model.vlm import VLM

MAX_GRAPHS = 32
"""Graphs of one function in a process, those of all stages and checkpointing modes together."""


class CompiledBlocks:
    """The blocks of a model, compiled for training until `restore_forward` or the end of `with`."""

    def __init__(self, vlm: VLM, enabled: bool = True, backend: str = "inductor") -> None:
        """Compile with a backend of torch.compile if `enabled`, at the first call of a block.

        What blocks recompute is part of what is compiled: it is set before.
        """
        self._blocks: list[nn.Module] = []
        self._dynamo_settings = contextlib.ExitStack()
        if enabled:
            self._blocks = [*vlm.language.model.layers, *vlm.encoder_blocks()]
            self._dynamo_settings.enter_context(
                # it would split graphs to overlap communication, which compiling by block does;
                # stages differ in what is trained, and checkpointing modes in what is recomputed
                compiler_settings(optimize_ddp=False, recompile_limit=MAX_GRAPHS)
            )
        # that of its class, unless activation checkpointing has set another one
        self._own_forwards = [vars(block).get("forward") for block in self._blocks]
        for block in self._blocks:
            compiled = torch.compile(block.forward, dynamic=True, backend=backend)
            block.forward = functools.partial(_forward_while_training, vlm, block.forward, compiled)

    def __enter__(self) -> CompiledBlocks:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore_forward()

    def restore_forward(self) -> None:
        """Restore the blocks and torch's process-wide compiler settings."""
        for block, forward in zip(self._blocks, self._own_forwards, strict=True):
            del block.forward  # the attribute of the object; the class keeps its method
            if forward is not None:
                block.forward = forward
        self._blocks, self._own_forwards = [], []
        self._dynamo_settings.close()


def _forward_while_training(
    vlm: VLM,
    eager_forward: Callable[..., Any],
    compiled_forward: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Forward of a block: compiled while `vlm` trains, eager otherwise.

    Held-out losses and answers have other dtypes and lengths, which would need graphs of their own.
    So would a last layer that computes its MLP for some positions.
    """
    if not vlm.training:
        return eager_forward(*args, **kwargs)
    kwargs.pop(POSITIONS, None)
    return compiled_forward(*args, **kwargs)
