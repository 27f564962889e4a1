"""When processes exchange gradients: in the last micro-batch of a step wherever memory allows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from vlbench.compat.lightning_internals import exchange_gradients, without_gradient_sync
from vlbench.model.fsdp_wrapping import defer_gradient_reduction
from vlbench.model.vlm import VLM

WHOLE_GRADIENTS_SHARE = 0.25
"""Share of a GPU's memory that fsdp2 may take for whole gradients between micro-batches."""
WHOLE_GRADIENT_BYTES = 4  # of a parameter: gradients are added up in float32


def whole_gradient_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Return the bytes of the gradients that a process keeps until they are reduced."""
    return WHOLE_GRADIENT_BYTES * sum(p.numel() for p in parameters if p.requires_grad)


def reduces_once_per_step(
    reduce_gradients: str, gradient_bytes: float, memory_bytes: float | None
) -> bool:
    """Tell whether fsdp2 keeps whole gradients and reduces them once a step.

    Args:
        reduce_gradients: The recipe's `trainer.reduce_gradients`: step, micro_batch or auto.
        gradient_bytes: Bytes of all gradients, see `whole_gradient_bytes`.
        memory_bytes: Memory of a GPU; None on a CPU, whose memory is not budgeted.
    """
    if reduce_gradients != "auto":
        return reduce_gradients == "step"
    return memory_bytes is None or gradient_bytes <= WHOLE_GRADIENTS_SHARE * memory_bytes


def device_memory(device: torch.device) -> int | None:
    """Return the bytes of a GPU, None on a CPU."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


def defer_gradient_sync(
    trainer: pl.Trainer, vlm: VLM, reduces_once: bool
) -> AbstractContextManager[Any]:
    """Return a context in which backward passes leave to a later one what processes exchange."""
    if isinstance(vlm, FSDPModule):
        return defer_gradient_reduction(vlm, keep_whole=reduces_once)
    return without_gradient_sync(trainer)


def put_gradients_into_buckets(trainer: pl.Trainer, vlm: VLM) -> None:
    """Give every trained parameter a gradient of zeros that lies in DDP's buckets.

    DDP puts a gradient there when it exchanges it, and a micro-batch whose gradients are only added
    up would make others beside the buckets: 4 bytes more for every number that is trained. What is
    there already is added to in place. The second pass is for the buckets that DDP makes after the
    first one, in the order in which gradients came; here it is that of the model, backwards.
    """
    parts = (part for _, part in vlm.named_parts())
    trained = [p for part in parts for p in part.parameters() if p.requires_grad]
    zero = torch.zeros((), device=vlm.device)
    for _ in range(2):
        for parameter in trained:
            parameter.grad = None
        exchange_gradients(trainer, sum((parameter.sum() * 0 for parameter in trained), zero))


@contextlib.contextmanager
def without_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Take gradients away until the end of `with`."""
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
