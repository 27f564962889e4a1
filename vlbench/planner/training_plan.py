"""The plan of a training: memory and operations per stage, and the cheapest strategy that fits."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from vlbench.config.stage_schema import StageConfig
from vlbench.errors import UserError
from vlbench.model.activation_checkpointing import CHECKPOINTING_MODES
from vlbench.model.vlm import VLM
from vlbench.planner.gpu_table import GpuSpec
from vlbench.planner.memory_estimate import MemoryByComponent, Sharding, StageMemory, total_bytes
from vlbench.planner.meta_model import build_meta_vlm
from vlbench.planner.options import PlanOptions
from vlbench.planner.simulate_step import DepthExtrapolator
from vlbench.planner.stage_workload import (
    StageSamples,
    StageWorkload,
    stage_samples,
    stage_workload,
)
from vlbench.train import stage_plan
from vlbench.train.auto_checkpointing import SPARE_MEMORY_SHARE
from vlbench.train.row_length import choose_row_tokens

STRATEGIES = ("ddp", "fsdp2")
"""The one with less communication first."""


@dataclass(frozen=True)
class StrategyEstimate:
    """A strategy with a checkpointing mode, at the recipe's row lengths."""

    strategy: str
    checkpointing_mode: str
    peak_memory: MemoryByComponent
    """Memory of the stage that needs most."""
    largest_stage: str
    total_flops: float
    """FLOPs of the whole training, recomputation included."""
    fits_memory: bool


@dataclass(frozen=True)
class TrainingPlan:
    """The plan: memory, work and estimates of all strategies."""

    options: PlanOptions
    stage_memory: dict[str, StageMemory]
    max_tokens_per_row: dict[str, int]
    """Of each stage: the recipe's, or what `auto` chooses on this GPU."""
    workloads: dict[str, StageWorkload]
    has_assumed_lengths: bool
    """Whether sample lengths are assumed, not measured."""
    skipped_stages: list[str]
    """Stages with a connector's own objective, whose FLOPs are not counted."""
    strategy_estimates: list[StrategyEstimate]
    cheapest_fit: tuple[StrategyEstimate, dict[str, int]] | None
    """The cheapest estimate that fits, and the values of max_tokens_per_row to be changed."""

    @property
    def memory_budget(self) -> float:
        """Bytes that a rank may use."""
        return usable_memory(self.options.gpu)


def usable_memory(gpu: GpuSpec) -> float:
    """Return the bytes that training may use, as `activation_checkpointing=auto` counts them."""
    return gpu.memory_bytes * (1 - SPARE_MEMORY_SHARE)


def make_plan(options: PlanOptions) -> TrainingPlan:
    """Return the plan of a training; nothing is trained, and weights take no memory."""
    recipe = options.recipe
    stage_plan.check_data(
        stage_plan.plan_stage_runs(
            recipe.selected_data, recipe.last_stage_data, skip_without_data=True
        )
    )
    stages: dict[str, StageMemory] = {}
    workloads: dict[str, StageWorkload] = {}
    skipped, has_assumed_lengths = [], False
    for index, (name, stage) in enumerate(recipe.selected_stages.items()):
        if stage.objective != "language":
            skipped.append(name)
            continue
        measured = measure_stage(options, index, name, stage)
        if not measured.samples.steps:  # `fit` passes over it
            continue
        stages[name] = measured.memory
        workloads[name] = stage_workload(name, stage, measured.memory.vlm, measured.samples)
        has_assumed_lengths |= measured.samples.are_assumed
    if not stages:
        raise UserError(
            "there is no stage to plan: plan counts stages that learn language, of one step or more"
        )
    memory_budget = usable_memory(options.gpu)
    row_tokens = {
        name: stage_row_tokens(options, name, stage.vlm, memory_budget)
        for name, stage in stages.items()
    }
    strategies = STRATEGIES if options.world_size > 1 else STRATEGIES[:1]
    estimates = estimate_strategies(stages, workloads, row_tokens, memory_budget, strategies)
    return TrainingPlan(
        options=options,
        stage_memory=stages,
        max_tokens_per_row=row_tokens,
        workloads=workloads,
        has_assumed_lengths=has_assumed_lengths,
        skipped_stages=skipped,
        strategy_estimates=estimates,
        cheapest_fit=cheapest_strategy(estimates, stages, row_tokens, memory_budget),
    )


class MeasuredStage(NamedTuple):
    """What of a stage does not depend on strategy and checkpointing."""

    memory: StageMemory
    samples: StageSamples


def measure_stage(options: PlanOptions, index: int, name: str, stage: StageConfig) -> MeasuredStage:
    """Build a stage that learns language on shapes; `index` is its number among those that run."""
    recipe = options.recipe
    build_at_depth = functools.partial(build_meta_vlm, recipe.model, name, stage, recipe.precision)
    vlm = build_at_depth()
    sample_count = options.sample_counts[index] if options.sample_counts else None
    text_tokens = options.text_tokens[index] if options.text_tokens else None
    samples = stage_samples(recipe.stage_data(name), vlm.processor, sample_count, text_tokens)
    memory = StageMemory(
        vlm=vlm.model,
        depth_extrapolator=DepthExtrapolator(vlm.model, build_at_depth, recipe.precision),
        mean_sample=samples.mean_sample,
        compute_dtype_bytes=2 if recipe.precision == "bf16" else 4,
        sharding=Sharding(
            options.world_size,
            recipe.trainer.shard_count,
            recipe.trainer.reduce_gradients,
            options.gpu.memory_bytes,
        ),
    )
    return MeasuredStage(memory, samples)


def stage_row_tokens(options: PlanOptions, stage_name: str, vlm: VLM, memory_budget: float) -> int:
    """Return the tokens of a packed row of a stage as training takes them."""
    recipe = options.recipe
    given = recipe.stages[stage_name].max_tokens_per_row
    if given != "auto":
        return given
    return choose_row_tokens(
        vlm,
        memory_budget,
        recipe.activation_checkpointing,
        bf16=recipe.precision == "bf16",
        shards=recipe.trainer.shard_count if options.strategy == "fsdp2" else 1,
    )


def estimate_strategies(
    stage_memory: Mapping[str, StageMemory],
    workloads: Mapping[str, StageWorkload],
    max_tokens_per_row: Mapping[str, int],
    memory_budget: float,
    strategies: tuple[str, ...] = STRATEGIES,
) -> list[StrategyEstimate]:
    """Return the estimate of every strategy with every checkpointing mode."""
    estimates = []
    for strategy in strategies:
        for mode in CHECKPOINTING_MODES:
            memory_by_stage = {
                name: stage.estimate_memory(strategy, mode, max_tokens_per_row[name])
                for name, stage in stage_memory.items()
            }
            # the first of the largest stages
            largest, peak = max(memory_by_stage.items(), key=lambda item: total_bytes(item[1]))
            estimates.append(
                StrategyEstimate(
                    strategy=strategy,
                    checkpointing_mode=mode,
                    peak_memory=peak,
                    largest_stage=largest,
                    total_flops=sum(work.total_flops(mode) for work in workloads.values()),
                    fits_memory=total_bytes(peak) <= memory_budget,
                )
            )
    return estimates


def cheapest_strategy(
    estimates: list[StrategyEstimate],
    stage_memory: Mapping[str, StageMemory],
    max_tokens_per_row: Mapping[str, int],
    memory_budget: float,
) -> tuple[StrategyEstimate, dict[str, int]] | None:
    """Return the estimate with the fewest FLOPs that fits, and the row lengths to be changed.

    Rows are shortened only where nothing fits at the recipe's lengths. None: nothing fits at all.
    """
    # stable: ddp stays before fsdp2
    by_flops = sorted(estimates, key=lambda estimate: estimate.total_flops)
    for estimate in by_flops:
        if estimate.fits_memory:
            return estimate, {}
    for estimate in by_flops:
        fitting = _fitting_rows(estimate, stage_memory, max_tokens_per_row, memory_budget)
        if fitting is not None:
            return estimate, {n: fitting[n] for n in stage_memory if n in fitting}
    return None


def _fitting_rows(
    estimate: StrategyEstimate,
    stage_memory: Mapping[str, StageMemory],
    max_tokens_per_row: Mapping[str, int],
    memory_budget: float,
) -> dict[str, int] | None:
    """Return the row lengths to be changed so that an estimate fits; None: a stage never does.

    What is most likely not to fit is tried first: a search takes seconds of simulation.
    """
    strategy, mode = estimate.strategy, estimate.checkpointing_mode
    changed: dict[str, int] = {}
    if not all(stage.holds_model(strategy, memory_budget) for stage in stage_memory.values()):
        return None
    for name in sorted(stage_memory, key=lambda name: name != estimate.largest_stage):
        wanted = max_tokens_per_row[name]
        fitting = stage_memory[name].max_row_tokens(strategy, mode, wanted, memory_budget)
        if not fitting:
            return None
        if fitting < wanted:
            changed[name] = fitting
    return changed
