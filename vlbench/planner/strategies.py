"""The arrangements of a training, and the cheapest that fits into a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vlbench.model.activation_checkpointing import CHECKPOINTING_MODES
from vlbench.planner.memory_estimate import MemoryByComponent, StageMemory, total_bytes
from vlbench.planner.stage_workload import StageWorkload

STRATEGIES = ("ddp", "fsdp2")
"""From the one that talks least."""


@dataclass(frozen=True)
class StrategyEstimate:
    """A strategy and a way of recomputing, with the rows of the recipe."""

    strategy: str
    checkpointing_mode: str
    peak_memory: MemoryByComponent
    """Of the stage that needs most."""
    largest_stage: str
    total_flops: float
    """Of the whole training, what is repeated included."""
    fits_memory: bool


def estimate_strategies(
    stage_memory: Mapping[str, StageMemory],
    workloads: Mapping[str, StageWorkload],
    max_tokens_per_row: Mapping[str, int],
    memory_budget: float,
    strategies: tuple[str, ...] = STRATEGIES,
) -> list[StrategyEstimate]:
    """Return all arrangements; `rows` are the max_tokens_per_row of the stages."""
    found = []
    for strategy in strategies:
        for way in CHECKPOINTING_MODES:
            needed = {
                n: one.estimate_memory(strategy, way, max_tokens_per_row[n])
                for n, one in stage_memory.items()
            }
            name = max(needed, key=lambda stage: total_bytes(needed[stage]))
            operations = sum(work.total_flops(way) for work in workloads.values())
            fits = total_bytes(needed[name]) <= memory_budget
            found.append(StrategyEstimate(strategy, way, needed[name], name, operations, fits))
    return found


def cheapest_strategy(
    estimates: list[StrategyEstimate],
    stage_memory: Mapping[str, StageMemory],
    max_tokens_per_row: Mapping[str, int],
    memory_budget: float,
) -> tuple[StrategyEstimate, dict[str, int]] | None:
    """Return what takes least and fits, with the max_tokens_per_row that have to change.

    Rows are made shorter only where nothing fits with those of the recipe. None: nothing fits.
    """
    in_order = sorted(estimates, key=lambda one: one.total_flops)  # stable: ddp stays before fsdp2
    for one in in_order:
        if one.fits_memory:
            return one, {}
    for one in in_order:
        shorter = {
            name: min(
                max_tokens_per_row[name],
                stage.max_row_tokens(
                    one.strategy, one.checkpointing_mode, max_tokens_per_row[name], memory_budget
                ),
            )
            for name, stage in stage_memory.items()
        }
        if all(shorter.values()):
            return one, {name: n for name, n in shorter.items() if n != max_tokens_per_row[name]}
    return None
