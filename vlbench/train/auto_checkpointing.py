"""`activation_checkpointing=auto`: the mode that keeps most and fits, found by a long step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vlbench.config.schema import Recipe
from vlbench.data.batch_sampler import StepDataset
from vlbench.data.packing import PackedBatch
from vlbench.distributed import collectives
from vlbench.distributed.process_group import is_fsdp_sharded
from vlbench.model.activation_checkpointing import CHECKPOINTING_MODES
from vlbench.model.contrastive_loss import add_contrast_pools
from vlbench.model.vlm import VLM

CANDIDATE_STEPS = 16  # steps among whose micro-batches the longest is tried
SPARE_MEMORY_SHARE = (
    0.05  # share of a GPU's memory that is left free: later steps may be a little longer
)
OPTIMIZER_BYTES_PER_PARAM = 8  # bytes that AdamW keeps of a trained number, two moments in float32


def set_activation_checkpointing(
    recipe: Recipe, vlm: VLM, steps: StepDataset, device: torch.device
) -> str:
    """Set what the stage keeps for its backward passes, and return the way.

    Several processes go the same way, that of the one with the least room. A model that is to be
    sharded cannot be tried whole, and keeps least.
    """
    how: str = recipe.activation_checkpointing
    if how == "auto" and is_fsdp_sharded(recipe):
        how = CHECKPOINTING_MODES[-1]
    elif how == "auto":
        mine = choose_checkpointing_mode(
            lambda way: _measure_peak_memory(recipe, vlm, steps, device, way), _memory_limit(device)
        )
        how = max(collectives.all_gather_objects(mine), key=CHECKPOINTING_MODES.index)
    vlm.enable_activation_checkpointing(how)
    return how


def choose_checkpointing_mode(
    measure_peak: Callable[[str], int | None], memory_limit: int | None
) -> str:
    """Return the first of WAYS whose peak in bytes is within `room`; the last if none is.

    A peak of None ran out of memory; a room of None has no limit that could be known.
    """
    if memory_limit is None:
        return CHECKPOINTING_MODES[0]
    for way in CHECKPOINTING_MODES[:-1]:
        needed = measure_peak(way)
        if needed is not None and needed <= memory_limit:
            return way
    return CHECKPOINTING_MODES[-1]


def _memory_limit(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory * (1 - SPARE_MEMORY_SHARE))


def _measure_peak_memory(
    recipe: Recipe, vlm: VLM, steps: StepDataset, device: torch.device, mode: str
) -> int | None:
    """Return the peak of the longest micro-batch in bytes, optimizer included; None if it failed.

    Nothing is changed: gradients are thrown away.
    """
    vlm.to(device).enable_activation_checkpointing(mode)
    batch = _longest_batch(steps)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            batch = add_contrast_pools(vlm, [batch.to(device)], all_processes=False)[0]
            out = vlm(batch)
        parts = [out.loss_sum, *(value for value, _ in out.extra.values())]
        torch.stack([part.float() for part in parts if part is not None]).sum().backward()
    except torch.OutOfMemoryError:
        return None
    finally:
        vlm.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    states = OPTIMIZER_BYTES_PER_PARAM * sum(p.numel() for p in vlm.parameters() if p.requires_grad)
    return torch.cuda.max_memory_allocated(device) + states + _pooled_feature_bytes(batch, steps)


def _pooled_feature_bytes(batch: PackedBatch, steps: StepDataset) -> int:
    """Return the bytes of features that `contrastive_loss` keeps of a step's other pairs."""
    if batch.contrast_pool is None or batch.features is None:
        return 0
    pairs = -(-steps.global_batch_size // steps.world_size) - len(batch.features)
    return max(0, pairs) * batch.features[0].nbytes


def _longest_batch(steps: StepDataset) -> PackedBatch:
    some = [
        batch for n in range(min(CANDIDATE_STEPS, len(steps))) for batch in steps[n].micro_batches
    ]
    return max(some, key=lambda batch: batch.input_ids.numel() + batch.pixels.numel())
