"""`checkpointing=auto`: the way that keeps most and still fits, found by trying a long step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vlbench import ranks
from vlbench.data.batch import Batch
from vlbench.data.steps import Steps
from vlbench.model.contrast import pooled
from vlbench.model.recompute import WAYS
from vlbench.model.vlm import VLM
from vlbench.schema import Recipe
from vlbench.train.join import sharded

LOOKED_AT = 16  # steps among whose micro-batches the longest is tried
SPARE = 0.05  # share of a GPU's memory that is left free: later steps may be a little longer
STATES = 8  # bytes that AdamW keeps of a trained number, two moments in float32


def settle(recipe: Recipe, vlm: VLM, steps: Steps, device: torch.device) -> str:
    """Set what the stage keeps for its backward passes, and return the way.

    Several processes go the same way, that of the one with the least room. A model that is to be
    sharded cannot be tried whole, and keeps least.
    """
    how: str = recipe.checkpointing
    if how == "auto" and sharded(recipe):
        how = WAYS[-1]
    elif how == "auto":
        mine = choose(lambda way: _peak(recipe, vlm, steps, device, way), _room(device))
        how = max(ranks.everyone(mine), key=WAYS.index)
    vlm.recompute(how)
    return how


def choose(peak: Callable[[str], int | None], room: int | None) -> str:
    """Return the first of WAYS whose peak in bytes is within `room`; the last if none is.

    A peak of None ran out of memory; a room of None has no limit that could be known.
    """
    if room is None:
        return WAYS[0]
    for way in WAYS[:-1]:
        needed = peak(way)
        if needed is not None and needed <= room:
            return way
    return WAYS[-1]


def _room(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory * (1 - SPARE))


def _peak(recipe: Recipe, vlm: VLM, steps: Steps, device: torch.device, way: str) -> int | None:
    """Return the peak of the longest micro-batch in bytes, optimizer included; None if it failed.

    Nothing is changed: gradients are thrown away.
    """
    vlm.to(device).recompute(way)
    batch = _longest(steps)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            batch = pooled(vlm, [batch.to(device)], shared=False)[0]
            out = vlm(batch)
        parts = [out.loss_sum, *(value for value, _ in out.extra.values())]
        torch.stack([part.float() for part in parts if part is not None]).sum().backward()
    except torch.OutOfMemoryError:
        return None
    finally:
        vlm.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    states = STATES * sum(p.numel() for p in vlm.parameters() if p.requires_grad)
    return torch.cuda.max_memory_allocated(device) + states + _kept(batch, steps)


def _kept(batch: Batch, steps: Steps) -> int:
    """Return the bytes of features that `model.contrast` keeps of the other pairs of a step."""
    if batch.pool is None or batch.features is None:
        return 0
    pairs = -(-steps.batch // steps.world) - len(batch.features)
    return max(0, pairs) * batch.features[0].nbytes


def _longest(steps: Steps) -> Batch:
    some = [batch for n in range(min(LOOKED_AT, len(steps))) for batch in steps[n].batches]
    return max(some, key=lambda batch: batch.ids.numel() + batch.pixels.numel())
