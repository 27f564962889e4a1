"""`activation_checkpointing=auto`: the mode that recomputes least and fits into memory."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vlbench.data.batch_sampler import StepDataset
from vlbench.data.packing import PackedBatch, empty_batch
from vlbench.distributed import collectives
from vlbench.model.activation_checkpointing import CHECKPOINTING_MODES
from vlbench.model.contrastive_loss import add_contrast_pools
from vlbench.model.vlm import VLM

CANDIDATE_STEPS = 16  # the longest micro-batch of these steps is measured
# share of a GPU's memory that is left free: later steps may be a little longer
SPARE_MEMORY_SHARE = 0.05
OPTIMIZER_BYTES_PER_PARAM = 8  # of AdamW's two moments, in float32


def set_activation_checkpointing(
    vlm: VLM,
    steps: StepDataset,
    device: torch.device,
    mode: str,
    *,
    bf16: bool,
    is_sharded: bool,
) -> str:
    """Set what is recomputed in the backward passes of a stage, and return the mode.

    Several processes take the same mode, that of the one with the least memory. A model that is to
    be sharded does not fit unsharded, so nothing can be measured: it recomputes most.

    Args:
        vlm: The model, prepared for the stage.
        steps: Its optimizer steps, with a length.
        device: Where it will be trained.
        mode: One of `CHECKPOINTING_MODES`, or `auto` to find the one that recomputes least and
            fits into the memory of a GPU.
        bf16: Whether the forward pass runs under bfloat16 autocast.
        is_sharded: Whether FSDP will shard the model.
    """
    if mode == "auto" and is_sharded:
        mode = CHECKPOINTING_MODES[-1]
    elif mode == "auto":
        rank_mode = choose_checkpointing_mode(
            lambda candidate: _measure_peak_memory(vlm, steps, device, candidate, bf16),
            _memory_limit(device),
        )
        mode = max(collectives.all_gather_objects(rank_mode), key=CHECKPOINTING_MODES.index)
    vlm.enable_activation_checkpointing(mode)
    return mode


def choose_checkpointing_mode(
    measure_peak: Callable[[str], int | None], memory_limit: int | None
) -> str:
    """Return the first of `CHECKPOINTING_MODES` whose peak is within the limit, else the last.

    Both are in bytes. A peak of None means out of memory, a limit of None that none is known.
    """
    if memory_limit is None:
        return CHECKPOINTING_MODES[0]
    for mode in CHECKPOINTING_MODES[:-1]:
        peak = measure_peak(mode)
        if peak is not None and peak <= memory_limit:
            return mode
    return CHECKPOINTING_MODES[-1]


def _memory_limit(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory * (1 - SPARE_MEMORY_SHARE))


def _measure_peak_memory(
    vlm: VLM, steps: StepDataset, device: torch.device, mode: str, bf16: bool
) -> int | None:
    """Return the peak of the longest micro-batch in bytes, with the optimizer's state.

    None if memory ran out. Nothing is changed: gradients are thrown away.
    """
    vlm.to(device).enable_activation_checkpointing(mode)
    batch = _longest_batch(steps)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            batch = add_contrast_pools(vlm, [batch.to(device)], all_processes=False)[0]
            out = vlm(batch)
        losses = [out.loss_sum, *(value for value, _ in out.extra.values())]
        total = torch.stack([loss.float() for loss in losses if loss is not None]).sum()
        torch.autograd.backward(total)
    except torch.OutOfMemoryError:
        return None
    finally:
        vlm.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    trained_count = sum(p.numel() for p in vlm.parameters() if p.requires_grad)
    optimizer_bytes = OPTIMIZER_BYTES_PER_PARAM * trained_count
    return (
        torch.cuda.max_memory_allocated(device)
        + optimizer_bytes
        + _pooled_feature_bytes(batch, steps)
    )


def _pooled_feature_bytes(batch: PackedBatch, steps: StepDataset) -> int:
    """Return the bytes of features that a contrastive loss keeps of other micro-batches."""
    if batch.contrast_pool is None or batch.features is None:
        return 0
    pairs = -(-steps.global_batch_size // steps.world_size) - len(batch.features)
    return max(0, pairs) * batch.features[0].nbytes


def _longest_batch(steps: StepDataset) -> PackedBatch:
    """Return the row of the first steps with the most images, of equal ones the longest."""
    step_count = min(CANDIDATE_STEPS, len(steps))
    rows = [row for index in range(step_count) for row in steps.plan_step(index).rows]
    longest = max(rows, key=lambda row: (row.image_count, sum(row.sample_lengths)))
    return steps.load_row(longest).batch or empty_batch()
