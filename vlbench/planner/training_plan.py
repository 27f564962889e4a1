"""The plan of a training: memory and operations per stage, and the cheapest strategy that fits."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from vlbench.errors import UserError
from vlbench.model.activation_checkpointing import CHECKPOINTING_MODES
from vlbench.planner.gpu_table import GpuSpec
from vlbench.planner.memory_estimate import MemoryByComponent, StageMemory, total_bytes
from vlbench.planner.meta_model import build_meta_vlm
from vlbench.planner.options import PlanOptions, stage_indices
from vlbench.planner.simulate_step import DepthExtrapolator
from vlbench.planner.stage_workload import StageWorkload, stage_workload
from vlbench.train import stage_plan
from vlbench.train.auto_checkpointing import SPARE_MEMORY_SHARE

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


@dataclass(frozen=True)
class TrainingPlan:
    """What was found."""

    options: PlanOptions
    stage_memory: dict[str, StageMemory]
    workloads: dict[str, StageWorkload]
    has_assumed_lengths: bool
    """Whether lengths are assumed."""
    skipped_stages: list[str]
    """Stages with objectives of a connector's own, whose operations nobody counts."""
    strategy_estimates: list[StrategyEstimate]
    cheapest_fit: tuple[StrategyEstimate, dict[str, int]] | None

    @property
    def memory_budget(self) -> float:
        """Bytes that a rank may take."""
        return usable_memory(self.options.gpu)

    @property
    def max_tokens_per_row(self) -> dict[str, int]:
        """The max_tokens_per_row of the stages."""
        return {
            name: self.options.recipe.stages[name].max_tokens_per_row for name in self.stage_memory
        }


def usable_memory(gpu: GpuSpec) -> float:
    """Return the bytes that training may take, as `activation_checkpointing=auto` sees it."""
    return gpu.memory_bytes * (1 - SPARE_MEMORY_SHARE)


def make_plan(options: PlanOptions) -> TrainingPlan:
    """Count everything; nothing is trained, and no weight takes memory."""
    recipe = options.recipe
    stage_plan.check_data(recipe, stage_plan.plan_stage_runs(recipe, skip_without_data=True))
    stages: dict[str, StageMemory] = {}
    works: dict[str, StageWorkload] = {}
    left_out, assumed = [], False
    for name, place in stage_indices(recipe).items():
        stage = recipe.stages[name]
        if stage.objective != "language":
            left_out.append(name)
            continue
        vlm = build_meta_vlm(recipe, name)
        pairs = options.sample_counts[place] if options.sample_counts else None
        text = options.text_tokens[place] if options.text_tokens else None
        works[name], guessed = stage_workload(recipe, name, vlm, pairs, text)
        assumed |= guessed
        make = functools.partial(build_meta_vlm, recipe, name)
        rehearsals = DepthExtrapolator(vlm, make, recipe.precision)
        width = 2 if recipe.precision == "bf16" else 4
        stages[name] = StageMemory(
            vlm, rehearsals, works[name].mean_sample, width, options.world_size
        )
    if not stages:
        raise UserError("there is no stage to plan: plan counts stages that learn language")
    rows = {name: recipe.stages[name].max_tokens_per_row for name in stages}
    strategies = STRATEGIES if options.world_size > 1 else STRATEGIES[:1]
    found = estimate_strategies(stages, works, rows, usable_memory(options.gpu), strategies)
    best = cheapest_strategy(found, stages, rows, usable_memory(options.gpu))
    return TrainingPlan(options, stages, works, assumed, left_out, found, best)


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
