"""Bytes of one GPU by component, for a strategy, a way of recomputing and a row."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from vlbench.model.fsdp_wrapping import fsdp_units
from vlbench.model.vlm import VLM
from vlbench.planner.memory_tracker import LOGITS, WEIGHT_COPIES
from vlbench.planner.meta_model import SampleShape, full_row_shape
from vlbench.planner.simulate_step import BACKWARD, DepthExtrapolator
from vlbench.train.auto_checkpointing import OPTIMIZER_BYTES_PER_PARAM

MemoryByComponent = dict[str, float]
"""Bytes of one rank at the peak of a step, by component."""
MEMORY_COMPONENTS = (
    *("weights", "gradients", "optimizer", "exchange"),
    *(WEIGHT_COPIES, "activations", LOGITS, BACKWARD),
)
MAX_SEARCH_STEPS = 4  # until the largest row is known well enough
MAX_SIMULATED_IMAGES = 256  # in a row, beyond which it is not tried
EXTRAPOLATION_MARGIN = 0.1  # share by which a line through short rows may be wrong about long ones
ROW_TOKENS_STEP = 256  # max_tokens_per_row are proposed in multiples of it
ROW_TOKENS_LIMIT = 1 << 17  # max_tokens_per_row beyond which nobody asks


@dataclass
class StageMemory:
    """A stage whose memory can be asked for."""

    vlm: VLM
    """On `meta`, made ready for the stage."""
    depth_extrapolator: DepthExtrapolator
    mean_sample: SampleShape
    compute_dtype_bytes: int
    """Bytes of a number in products."""
    world_size: int
    """Ranks that share the model."""
    cached_peaks: dict[tuple[int, str], dict[str, float]] = field(default_factory=dict)

    def estimate_memory(
        self, strategy: str, checkpointing_mode: str, max_tokens_per_row: int
    ) -> MemoryByComponent:
        """Return the bytes of a rank when its rows are full."""
        asked = (max_tokens_per_row, checkpointing_mode)
        if asked not in self.cached_peaks:
            places = self.vlm.connector.tokens_per_image
            self.cached_peaks[asked] = self.depth_extrapolator.peak_memory(
                full_row_shape(self.mean_sample, max_tokens_per_row, places), checkpointing_mode
            )
        step = self.cached_peaks[asked]
        if (
            strategy == "fsdp2" and self.world_size > 1
        ):  # weights are gathered in the type of products
            step = {kind: size for kind, size in step.items() if kind != WEIGHT_COPIES}
        found = (
            persistent_memory(self.vlm, strategy, self.world_size, self.compute_dtype_bytes) | step
        )
        return {kind: found.get(kind, 0) for kind in MEMORY_COMPONENTS}

    def max_row_tokens(
        self, strategy: str, checkpointing_mode: str, first_row_tokens: int, memory_budget: float
    ) -> int:
        """Return the largest max_tokens_per_row of a step in at most `room` bytes; 0 if none.

        Memory grows with the row almost as a line: what the line through `near` and twice `near`
        says is tried. Rows of very many pictures take minutes, so there it is believed, less CARE.
        """
        if (
            total_bytes(
                persistent_memory(self.vlm, strategy, self.world_size, self.compute_dtype_bytes)
            )
            > memory_budget
        ):
            return 0
        least = math.ceil(self.mean_sample.token_count)
        low = max(least, first_row_tokens)
        high = 2 * low
        sizes = [
            total_bytes(self.estimate_memory(strategy, checkpointing_mode, row))
            for row in (low, high)
        ]
        slope = max((sizes[1] - sizes[0]) / (high - low), 1.0)
        row, needed = (high, sizes[1]) if sizes[1] <= memory_budget else (low, sizes[0])
        for _ in range(MAX_SEARCH_STEPS):
            row = min(
                ROW_TOKENS_LIMIT,
                int((row + (memory_budget - needed) / slope) // ROW_TOKENS_STEP) * ROW_TOKENS_STEP,
            )
            if row < least:
                break
            if (
                row > high
                and row * self.mean_sample.image_count / self.mean_sample.token_count
                > MAX_SIMULATED_IMAGES
            ):
                return max(high, int(row * (1 - EXTRAPOLATION_MARGIN)))
            needed = total_bytes(self.estimate_memory(strategy, checkpointing_mode, row))
            if needed <= memory_budget:
                return row
        return (
            least
            if total_bytes(self.estimate_memory(strategy, checkpointing_mode, least))
            <= memory_budget
            else 0
        )


def total_bytes(memory: MemoryByComponent) -> float:
    """Return the bytes of all components."""
    return sum(memory.values())


def persistent_memory(
    vlm: VLM, strategy: str, world_size: int, compute_dtype_bytes: int
) -> MemoryByComponent:
    """Return what is there all the time: weights, gradients, moments, what is exchanged.

    Under `ddp` gradients lie in the buckets that are exchanged. Under `fsdp2` all but `exchange` is
    divided among ranks; that is what is gathered (`model.fsdp_wrapping`): the weights of
    no unit, in
    float32, and of two units, one of them on its way, in `width` bytes if they are blocks of tower
    and language model, and their gradients, which are added up in float32.
    """
    trained = [one for one in vlm.parameters() if one.requires_grad]
    weights = _tensor_bytes(vlm.parameters()) + _tensor_bytes(vlm.buffers())
    gradients, optimizer = (
        _tensor_bytes(trained),
        OPTIMIZER_BYTES_PER_PARAM * sum(one.numel() for one in trained),
    )
    share = world_size if strategy == "fsdp2" else 1
    exchange = 0.0
    if world_size > 1:
        exchange = _gathered_bytes(vlm, compute_dtype_bytes) if strategy == "fsdp2" else 0.0
    return {
        "weights": weights / share,
        "gradients": gradients / share,
        "optimizer": optimizer / share,
        "exchange": exchange,
    }


def _gathered_bytes(vlm: VLM, compute_dtype_bytes: int) -> float:
    found = [list(unit.parameters()) for unit in fsdp_units(vlm)]
    inside = {id(one) for unit in found for one in unit}
    root = [one for one in vlm.parameters() if id(one) not in inside]
    own = {id(one) for one in vlm.connector.parameters()}
    sizes = (_unit_bytes(unit, 4 if id(unit[0]) in own else compute_dtype_bytes) for unit in found)
    return _unit_bytes(root, 4) + sum(sorted(sizes, reverse=True)[:2])


def _unit_bytes(parameters: list[nn.Parameter], weight_bytes: int) -> float:
    return sum(one.numel() * (weight_bytes + 4 * one.requires_grad) for one in parameters)


def _tensor_bytes(tensors: Iterable) -> float:
    return float(sum(one.numel() * one.element_size() for one in tensors))
