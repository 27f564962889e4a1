"""`activation_checkpointing=auto`: the mode that recomputes least and fits into memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from vlbench.connector.blank_inputs import blank_features
from vlbench.connector.levels import as_levels
from vlbench.data.batch_sampler import StepDataset
from vlbench.data.filler_batches import empty_batch, extend_row
from vlbench.data.packing import PackedBatch
from vlbench.distributed import collectives
from vlbench.model.activation_checkpointing import CHECKPOINTING_MODES
from vlbench.model.compile_blocks import CompiledBlocks
from vlbench.model.contrastive_loss import add_contrast_pools, is_contrastive
from vlbench.model.mixed_precision import autocast_context
from vlbench.model.vlm import VLM, VLMOutput
from vlbench.system_errors import is_memory_error

CANDIDATE_SAMPLES = 512  # the row with most images is looked for among these
# share of a GPU's memory that is left free: a later row may have more images
SPARE_MEMORY_SHARE = 0.05
OPTIMIZER_BYTES_PER_PARAM = 8  # of AdamW's two moments, in float32


class MemoryMeter(Protocol):
    """The memory of a device, as an allocator counts it."""

    def limit_bytes(self) -> int | None:
        """Return how many bytes this process may have in tensors; None if no limit is known."""

    def reset_peak(self) -> None:
        """Forget the peak: from now on it is what is held, or more."""

    def peak_bytes(self) -> int:
        """Return the most bytes of tensors that were held at a time since `reset_peak`."""

    def release_unused(self) -> None:
        """Give back to the device what no tensor holds."""


class DeviceMemory:
    """The memory of a GPU; that of other devices has no limit."""

    def __init__(self, device: torch.device) -> None:
        """Measure on `device`."""
        self._device = device

    def limit_bytes(self) -> int | None:
        """Return what is free and what this process has already, less a share that stays free.

        What other processes hold, and contexts and libraries outside of torch, is left out.
        """
        if self._device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(self._device)
        own = torch.cuda.memory_reserved(self._device)
        return int(free + own - SPARE_MEMORY_SHARE * total)

    def reset_peak(self) -> None:
        """See `MemoryMeter`."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak_bytes(self) -> int:
        """See `MemoryMeter`."""
        return torch.cuda.max_memory_allocated(self._device)

    def release_unused(self) -> None:
        """See `MemoryMeter`."""
        torch.cuda.empty_cache()


def set_activation_checkpointing(
    vlm: VLM,
    steps: StepDataset,
    device: torch.device,
    mode: str,
    *,
    bf16: bool,
    is_sharded: bool,
    is_compiled: bool = False,
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
        is_compiled: Whether the blocks will be compiled; then compiled ones are measured.
    """
    if mode == "auto" and is_sharded:
        mode = CHECKPOINTING_MODES[-1]
    elif mode == "auto":
        meter = DeviceMemory(device)
        rank_mode = collectives.call_on_all_ranks(
            lambda: _choose_on_device(vlm, steps, device, meter, bf16, is_compiled)
        )
        mode = max(collectives.all_gather_objects(rank_mode), key=CHECKPOINTING_MODES.index)
    vlm.enable_activation_checkpointing(mode)
    return mode


def _choose_on_device(
    vlm: VLM,
    steps: StepDataset,
    device: torch.device,
    meter: MemoryMeter,
    bf16: bool,
    is_compiled: bool,
) -> str:
    if meter.limit_bytes() is None:
        return CHECKPOINTING_MODES[0]
    vlm.to(device)
    row = largest_row(vlm, steps)
    other_features = _pooled_feature_bytes(vlm, row, steps)

    def measure_peak(mode: str) -> int | None:
        vlm.enable_activation_checkpointing(mode)
        with CompiledBlocks(vlm, is_compiled):
            peak = measure_step_memory(vlm, row.to(device), meter, bf16)
        return None if peak is None else peak + other_features

    return choose_checkpointing_mode(measure_peak, meter.limit_bytes())


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


def measure_step_memory(vlm: VLM, batch: PackedBatch, meter: MemoryMeter, bf16: bool) -> int | None:
    """Return the peak bytes of an optimizer step of several micro-batches; None: out of memory.

    The micro-batch runs twice. The first time makes the gradients, which are there from then on,
    and compiles what is compiled; the second is measured. The state of the optimizer, which does
    not change while gradients are computed, is added. Nothing is changed: gradients are thrown
    away.
    """
    peak: int | None = None
    try:
        run_micro_batch(vlm, batch, bf16)
        meter.reset_peak()
        run_micro_batch(vlm, batch, bf16)
        peak = meter.peak_bytes()
    except Exception as error:
        if not is_memory_error(error):
            raise
    # only here, where no error holds the frames of the pass and so its activations
    vlm.zero_grad(set_to_none=True)
    gc.collect()  # frames may be held by cycles
    meter.release_unused()
    if peak is None:
        return None
    trained_count = sum(p.numel() for p in vlm.parameters() if p.requires_grad)
    return peak + OPTIMIZER_BYTES_PER_PARAM * trained_count


def run_micro_batch(vlm: VLM, batch: PackedBatch, bf16: bool) -> None:
    """Add the gradients of a micro-batch that is a step of its own, exchanging nothing."""
    with autocast_context(vlm.device.type, bf16):
        pooled = add_contrast_pools(vlm, [batch], all_processes=False)[0]
        torch.autograd.backward(total_loss(vlm(pooled)))


def total_loss(output: VLMOutput) -> Tensor:
    """Return the sum of all losses of a micro-batch."""
    losses = [output.loss_sum, *(value for value, _ in output.extra.values())]
    return torch.stack([loss.float() for loss in losses if loss is not None]).sum()


def largest_row(vlm: VLM, steps: StepDataset) -> PackedBatch:
    """Return a micro-batch as large as any of the stage is likely to be.

    Of the first samples it is the row with most views of images. Where the language model is
    trained, text fills it to the longest row that the stage may have, since such a row may come
    later.
    """
    row = _densest_row(steps)
    if vlm.objective != "language":
        return row
    return extend_row(row, max(steps.max_tokens_per_row, steps.encoder.max_length))


def _densest_row(steps: StepDataset) -> PackedBatch:
    """Return the row of the first steps with most views of images, of equal ones the longest.

    Images are opened of that row alone; rows without a sample that can be used are passed over.
    """
    step_samples = -(-steps.global_batch_size // steps.world_size)
    step_count = min(len(steps), -(-CANDIDATE_SAMPLES // step_samples))
    rows = [row for index in range(step_count) for row in steps.plan_step(index).rows]
    for row in sorted(rows, key=lambda row: (row.view_count, sum(row.sample_lengths)))[::-1]:
        batch = steps.load_row(row).batch
        if batch is not None:
            return batch
    return empty_batch()


def _pooled_feature_bytes(vlm: VLM, row: PackedBatch, steps: StepDataset) -> int:
    """Return the bytes of features that a contrastive loss keeps of other micro-batches."""
    if not is_contrastive(vlm) or vlm.is_vision_trained():
        return 0
    pairs = -(-steps.global_batch_size // steps.world_size) - len(row.pixels)
    levels = as_levels(blank_features(vlm.connector, vlm.shapes, vlm.vision.dtype))
    return max(0, pairs) * sum(level.nbytes for level in levels)
