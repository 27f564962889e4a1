"""The learning-rate schedule: linear warm-up, then a half cosine to zero or a constant rate."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def learning_rate_factor(step: int, total_steps: int, warmup_ratio: float, schedule: str) -> float:
    """Return the share of the peak learning rate in optimizer step `step` (0 is the first).

    The rate rises linearly in the first `warmup_ratio` of the steps; `schedule` is what follows,
    cosine or constant.
    """
    warmup_steps = max(1, round(total_steps * warmup_ratio)) if warmup_ratio else 0
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    decay_steps = max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / decay_steps))


def build_lr_scheduler(
    optimizer: Optimizer, steps_done: int, total_steps: int, warmup_ratio: float, schedule: str
) -> LambdaLR:
    """Return the schedule of a new optimizer, whose groups have their peak rate as `lr`.

    It starts after `steps_done` of `total_steps` optimizer steps, so a checkpoint need not hold it.
    """
    return LambdaLR(
        optimizer,
        lambda step: learning_rate_factor(steps_done + step, total_steps, warmup_ratio, schedule),
    )
