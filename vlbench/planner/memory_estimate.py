"""Memory of one GPU by component, for a strategy, a checkpointing mode and a row length."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn

from vlbench.model.frozen_bf16 import FROZEN_DTYPE
from vlbench.model.fsdp_wrapping import fsdp_units
from vlbench.model.vlm import VLM
from vlbench.planner.memory_tracker import LOGITS, WEIGHT_COPIES
from vlbench.planner.meta_model import SampleShape, full_row_shape
from vlbench.planner.simulate_step import BACKWARD, DepthExtrapolator
from vlbench.train.auto_checkpointing import OPTIMIZER_BYTES_PER_PARAM
from vlbench.train.gradient_sync import reduces_once_per_step, whole_gradient_bytes

MemoryByComponent = dict[str, float]
"""Bytes of one rank at the peak of a step, by component."""
MEMORY_COMPONENTS = (
    *("weights", "gradients", "optimizer", "exchange"),
    *(WEIGHT_COPIES, "activations", LOGITS, BACKWARD),
)
MAX_SEARCH_STEPS = 4  # of the search for the largest row
MAX_SIMULATED_VIEWS = 256  # rows with more views of images are extrapolated, not simulated
EXTRAPOLATION_MARGIN = 0.1  # relative error of extrapolating from short rows to long ones
ROW_TOKENS_STEP = 256  # proposed values of max_tokens_per_row are multiples of it
ROW_TOKENS_LIMIT = 1 << 17  # largest proposed max_tokens_per_row


@dataclass(frozen=True)
class Sharding:
    """How FSDP2 divides a model, and what it keeps whole."""

    world_size: int = 1
    """Number of ranks."""
    shard_count: int = 1
    """Over how many of them a model is divided; the rest are replicas."""
    reduce_gradients: str = "auto"
    """The recipe's `trainer.reduce_gradients`."""
    gpu_bytes: float | None = None
    """Memory of a GPU."""


@dataclass
class StageMemory:
    """The memory of a stage as a function of strategy, checkpointing and row length."""

    vlm: VLM
    """On `meta`, prepared for the stage."""
    depth_extrapolator: DepthExtrapolator
    mean_sample: SampleShape
    compute_dtype_bytes: int
    """Bytes of a number in matrix products: 2 for bf16, else 4."""
    sharding: Sharding
    """What FSDP2 does."""
    cached_peaks: dict[tuple[int, str], MemoryByComponent] = field(default_factory=dict)
    """Peaks of a micro-batch by (max_tokens_per_row, checkpointing mode)."""

    def estimate_memory(
        self, strategy: str, checkpointing_mode: str, max_tokens_per_row: int
    ) -> MemoryByComponent:
        """Return the bytes of a rank at the peak of a step with full rows."""
        key = (max_tokens_per_row, checkpointing_mode)
        if key not in self.cached_peaks:
            row = full_row_shape(self.mean_sample, max_tokens_per_row)
            self.cached_peaks[key] = self.depth_extrapolator.peak_memory(row, checkpointing_mode)
        step_memory = self.cached_peaks[key]
        if strategy == "fsdp2" and self.sharding.world_size > 1:
            # weights are gathered in the dtype of matrix products, so autocast copies none
            step_memory = {
                kind: size for kind, size in step_memory.items() if kind != WEIGHT_COPIES
            }
        memory = self._persistent_memory(strategy) | step_memory
        return {component: memory.get(component, 0) for component in MEMORY_COMPONENTS}

    @property
    def reduces_once(self) -> bool:
        """Whether FSDP2 keeps whole gradients and reduces them once a step."""
        return reduces_once_per_step(
            self.sharding.reduce_gradients,
            whole_gradient_bytes(self.vlm.parameters()),
            self.sharding.gpu_bytes,
        )

    def _persistent_memory(self, strategy: str) -> MemoryByComponent:
        return persistent_memory(self.vlm, strategy, self.sharding, self.compute_dtype_bytes)

    def holds_model(self, strategy: str, memory_budget: float) -> bool:
        """Tell whether weights, gradients and optimizer alone leave any room."""
        return total_bytes(self._persistent_memory(strategy)) <= memory_budget

    def max_row_tokens(
        self, strategy: str, checkpointing_mode: str, first_row_tokens: int, memory_budget: float
    ) -> int:
        """Return the largest max_tokens_per_row whose step fits; 0 if none does.

        Memory is almost linear in the row length, so the line through two lengths gives the next
        one to simulate. Rows with very many views take minutes to simulate: there the line is
        trusted, less `EXTRAPOLATION_MARGIN`.

        Args:
            strategy: `ddp` or `fsdp2`.
            checkpointing_mode: one of `CHECKPOINTING_MODES`.
            first_row_tokens: the first length to simulate; the second is twice as long.
            memory_budget: bytes that a rank may use.
        """

        def bytes_at(row_tokens: int) -> float:
            return total_bytes(self.estimate_memory(strategy, checkpointing_mode, row_tokens))

        if not self.holds_model(strategy, memory_budget):
            return 0
        shortest = math.ceil(self.mean_sample.token_count)
        low = max(shortest, first_row_tokens)
        high = 2 * low
        low_bytes, high_bytes = bytes_at(low), bytes_at(high)
        slope = max((high_bytes - low_bytes) / (high - low), 1.0)
        row, needed = (high, high_bytes) if high_bytes <= memory_budget else (low, low_bytes)
        views_per_token = self.mean_sample.view_count / self.mean_sample.token_count
        for _ in range(MAX_SEARCH_STEPS):
            steps = int((row + (memory_budget - needed) / slope) // ROW_TOKENS_STEP)
            row = min(ROW_TOKENS_LIMIT, steps * ROW_TOKENS_STEP)
            if row < shortest:
                break
            if row > high and row * views_per_token > MAX_SIMULATED_VIEWS:
                return max(high, int(row * (1 - EXTRAPOLATION_MARGIN)))
            needed = bytes_at(row)
            if needed <= memory_budget:
                return row
        return shortest if bytes_at(shortest) <= memory_budget else 0


def total_bytes(memory: MemoryByComponent) -> float:
    """Return the sum over the components."""
    return sum(memory.values())


def persistent_memory(
    vlm: VLM, strategy: str, sharding: Sharding, compute_dtype_bytes: int
) -> MemoryByComponent:
    """Return the memory outside of a micro-batch: weights, gradients, optimizer, communication.

    Under `ddp` the gradients are views of the all-reduce buckets, so `exchange` is 0. Under `fsdp2`
    all but `exchange` is divided among the ranks; so are gradients, unless they are kept whole
    between micro-batches (`train.gradient_sync`). `exchange` is what is gathered
    (`model.fsdp_wrapping`): the parameters outside of any unit, in float32; two units, one of them
    prefetched, in `compute_dtype_bytes` for blocks of vision encoder and language model; and their
    gradients, which are reduced in float32.
    """
    trained = [parameter for parameter in vlm.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZER_BYTES_PER_PARAM * sum(parameter.numel() for parameter in trained)
    weights = _tensor_bytes(vlm.parameters()) + _tensor_bytes(vlm.buffers())
    is_sharded = strategy == "fsdp2" and sharding.world_size > 1
    shards = sharding.shard_count if is_sharded else 1
    if is_sharded:  # shards need one dtype: frozen weights are not held in 16 bits
        weights += sum(2 * p.numel() for p in vlm.parameters() if p.dtype is FROZEN_DTYPE)
    gradients = _tensor_bytes(trained) / shards
    if is_sharded and reduces_once_per_step(
        sharding.reduce_gradients, whole_gradient_bytes(trained), sharding.gpu_bytes
    ):
        gradients = whole_gradient_bytes(trained)
    return {
        "weights": weights / shards,
        "gradients": gradients,
        "optimizer": optimizer / shards,
        "exchange": _gathered_bytes(vlm, compute_dtype_bytes) if is_sharded else 0.0,
    }


def _gathered_bytes(vlm: VLM, compute_dtype_bytes: int) -> float:
    """Return the bytes of the parameters outside of FSDP units and of the two largest units."""
    units = [list(unit.parameters()) for unit in fsdp_units(vlm)]
    in_units = {id(parameter) for unit in units for parameter in unit}
    root = [parameter for parameter in vlm.parameters() if id(parameter) not in in_units]
    of_connector = {id(parameter) for parameter in vlm.connector.parameters()}
    sizes = (
        _unit_bytes(unit, 4 if id(unit[0]) in of_connector else compute_dtype_bytes)
        for unit in units
    )
    return _unit_bytes(root, 4) + sum(sorted(sizes, reverse=True)[:2])


def _unit_bytes(parameters: list[nn.Parameter], weight_bytes: int) -> float:
    return sum(
        parameter.numel() * (weight_bytes + 4 * parameter.requires_grad) for parameter in parameters
    )


def _tensor_bytes(tensors: Iterable[Tensor]) -> float:
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
