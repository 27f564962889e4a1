"""Decoder layers and tower blocks compiled, one by one and for rows of any length.

What is compiled is `forward` alone: hooks of a block (those that inject, those of shards) stay
outside, so that all blocks share a few graphs and the names of weights do not change.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlbench.compat.torch_internals import compiler_settings
from vlbench.errors import one_line

if TYPE_CHECKING:
    from vlbench.model.vlm import VLM


class CompiledBlocks:
    """The blocks of a model, compiled until `release` or the end of `with`, while it trains."""

    def __init__(self, vlm: VLM, enabled: bool = True, backend: str = "inductor") -> None:
        """Compile with `backend` of torch, if `wanted`; it works at the first call of a block."""
        self._blocks: list[nn.Module] = []
        self._dynamo_settings = contextlib.ExitStack()
        if enabled:
            self._blocks = [*vlm.language.model.layers, *vlm.vision.blocks()]
            # it would cut graphs to send gradients early, which blocks do anyway
            self._dynamo_settings.enter_context(compiler_settings(optimize_ddp=False))
        for block in self._blocks:
            compiled = torch.compile(block.forward, dynamic=True, backend=backend)
            block.forward = functools.partial(_forward_while_training, vlm, block.forward, compiled)

    def __enter__(self) -> CompiledBlocks:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore_forward()

    def restore_forward(self) -> None:
        """Leave the blocks, and what torch does for all models of the process, as they were."""
        for block in self._blocks:
            del block.forward  # the attribute of this one object: its class has the method
        self._blocks = []
        self._dynamo_settings.close()


def _forward_while_training(
    vlm: VLM,
    eager_forward: Callable[..., Any],
    compiled_forward: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Be the `forward` of a block: `compiled` while `vlm` trains, `plain` at other times.

    Held-out losses and answers have other types and lengths, so other graphs, and are few.
    """
    return (compiled_forward if vlm.training else eager_forward)(*args, **kwargs)


def describe_compiler_error(error: BaseException) -> str:
    """Return the first lines of what the compiler says, as one."""
    return one_line(error, max_lines=2)
