"""`python -m vlbench plan recipe=... gpu=...`: memory, time and money of a training, on shapes."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from vlbench.config import recipe as recipes
from vlbench.errors import UserError
from vlbench.planner import plan_report
from vlbench.planner.extrapolate import DepthExtrapolator
from vlbench.planner.gpu_table import GpuSpec
from vlbench.planner.memory_estimate import StageMemory
from vlbench.planner.meta_model import build_meta_vlm
from vlbench.planner.options import PlanOptions, stage_indices
from vlbench.planner.stage_workload import StageWorkload, stage_workload
from vlbench.planner.strategies import (
    STRATEGIES,
    StrategyEstimate,
    cheapest_strategy,
    estimate_strategies,
)
from vlbench.train import stage_plan
from vlbench.train.auto_checkpointing import SPARE_MEMORY_SHARE


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
    stage_plan.check_data(stage_plan.plan_stage_runs(recipe, skip_without_data=True))
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


def run_plan(options: PlanOptions) -> int:
    """Print the plan of a training; with `probe=true` try it here. Return the exit code."""
    if options.probe:
        recipes.require_data(options.recipe)
    print("\n".join(plan_report.format_plan(make_plan(options))), flush=True)
    if not options.probe:
        return 0
    from vlbench.train.dry_run import dry_run

    print("\nprobe: one step of every stage, longest batch first", flush=True)
    return dry_run(options.recipe)
