"""Parameters that FSDP2 does not shard: replicated in every process, with averaged gradients.

FSDP2 refuses scalars. Plain tensors beside sharded ones (DTensor) also need care in the optimizer
and in gradient clipping, as torch's fused kernels do not take both in one call.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from vlbench.compat.torch_internals import scale_in_place
from vlbench.distributed import collectives


class GradientAverager:
    """Averages the gradients of parameters over the processes at the end of every backward pass.

    Gradients may be accumulated over several passes: what was averaged before is equal in all
    processes, so averaging it again does not change it.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average those of `parameters` that are trained; every process has the same ones."""
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.average_queued = self.is_paused = False
        """While True, gradients are only added up; a later pass averages their sum."""
        parameter: Any  # torch does not annotate the method
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._queue_average)

    def _queue_average(self, _: Tensor) -> None:
        """Average when this backward pass ends: the order of hooks may differ by process."""
        if not self.average_queued and not self.is_paused:
            self.average_queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._average_gradients)

    def _average_gradients(self) -> None:
        """Average all gradients in one all-reduce; one that no process has stays None."""
        self.average_queued = False
        grads = [parameter.grad for parameter in self.parameters]
        sizes = [parameter.numel() for parameter in self.parameters]
        first = self.parameters[0]
        is_present = torch.tensor([float(grad is not None) for grad in grads], device=first.device)
        rows = [
            (p.new_zeros(p.numel()) if grad is None else grad.flatten())
            for p, grad in zip(self.parameters, grads, strict=True)
        ]
        buffer = torch.cat([*rows, is_present])  # of the widest dtype among them
        distributed.all_reduce(buffer)
        *sums, present_counts = torch.split(buffer, [*sizes, len(sizes)])
        is_absent = present_counts == 0 if None in grads else None
        for number, (parameter, total) in enumerate(zip(self.parameters, sums, strict=True)):
            if is_absent is None or not is_absent[number]:
                mean = total / distributed.get_world_size()
                parameter.grad = mean.view_as(parameter).to(parameter.dtype)


def split_by_sharding(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return parameters in one list, or in two if some are sharded and some are not."""
    groups: dict[bool, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(isinstance(parameter, DTensor), []).append(parameter)
    return list(groups.values()) or [[]]


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Scale gradients down to `max_norm` if their norm is larger; return the norm before that."""
    groups = split_by_sharding(parameters)
    if len(groups) == 1:
        return float(collectives.gather_full_tensor(nn.utils.clip_grad_norm_(parameters, max_norm)))
    grads = [[p.grad for p in group if p.grad is not None] for group in groups]
    norm = math.hypot(
        *(float(collectives.gather_full_tensor(nn.utils.get_total_norm(group))) for group in grads)
    )
    if norm > max_norm:
        for group in filter(None, grads):
            scale_in_place(group, max_norm / (norm + 1e-6))  # as torch's own clipping
    return norm
