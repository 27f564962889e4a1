"""Parameters that FSDP2 does not shard: every process has them whole and averages their gradients.

FSDP2 refuses scalars. Its plain tensors beside sharded ones (DTensor) also need some care in the
optimizer and when gradients are clipped, as torch's fused kernels do not take both at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from vlbench.compat.torch_internals import scale_in_place
from vlbench.distributed import collectives


class GradientAverager:
    """Average the gradients of parameters over the processes at the end of every backward pass.

    Gradients may be accumulated over several passes: what was averaged before is equal everywhere,
    so that its average is itself.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], process_group: ProcessGroup) -> None:
        """Watch those of `parameters` that are trained; every process has the same ones."""
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.process_group, self.average_queued = process_group, False
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._queue_average)

    def _queue_average(self, _: Tensor) -> None:
        """Have the average taken when this backward pass ends: the order of hooks may differ."""
        if not self.average_queued:
            self.average_queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._average_gradients)  # type: ignore[attr-defined]

    def _average_gradients(self) -> None:
        """Average all gradients in one exchange; one that no process has stays absent."""
        self.average_queued = False
        given = [parameter.grad for parameter in self.parameters]
        sizes = [parameter.numel() for parameter in self.parameters]
        first = self.parameters[0]
        there = torch.tensor([float(grad is not None) for grad in given], device=first.device)
        rows = [
            (p.new_zeros(p.numel()) if grad is None else grad.flatten())
            for p, grad in zip(self.parameters, given, strict=True)
        ]
        sent = torch.cat([*rows, there])  # of the widest type among them
        distributed.all_reduce(sent, group=self.process_group)
        *sums, known = sent.split([*sizes, len(sizes)])
        absent = known == 0 if None in given else None
        for number, (parameter, total) in enumerate(zip(self.parameters, sums, strict=True)):
            if absent is None or not absent[number]:
                mean = total / distributed.get_world_size(self.process_group)
                parameter.grad = mean.view_as(parameter).to(parameter.dtype)


def split_by_sharding(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return parameters in one list, or in two where some are sharded and some are not."""
    found: dict[bool, list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault(isinstance(parameter, DTensor), []).append(parameter)
    return list(found.values()) or [[]]


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Scale gradients down to norm `limit` if theirs is larger; return the norm that they had."""
    groups = split_by_sharding(parameters)
    if len(groups) == 1:
        return float(collectives.gather_full_tensor(nn.utils.clip_grad_norm_(parameters, max_norm)))
    grads = [[one.grad for one in group if one.grad is not None] for group in groups]
    norm = math.hypot(
        *(float(collectives.gather_full_tensor(nn.utils.get_total_norm(some))) for some in grads)
    )
    if norm > max_norm:
        for some in filter(None, grads):
            scale_in_place(some, max_norm / (norm + 1e-6))  # as torch's own clipping
    return norm
