"""A dry run: a few steps per stage, the longest first, so that what fails does so in a minute."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from torch.utils.data import DataLoader

from vlbench.config.schema import Recipe
from vlbench.data.batch_sampler import OptimizerStep
from vlbench.distributed import collectives
from vlbench.distributed.process_group import is_fsdp_sharded
from vlbench.errors import UserError
from vlbench.model.compile_blocks import CompiledBlocks
from vlbench.train import run_report
from vlbench.train.auto_checkpointing import set_activation_checkpointing
from vlbench.train.fit import build_or_resume_model, hold_frozen_bf16
from vlbench.train.lightning_trainer import build_trainer, explain_stage_errors, root_device
from vlbench.train.shape_checks import check_stage_shapes
from vlbench.train.stage_plan import StageRun, build_stage_steps, check_data
from vlbench.train.throughput import peak_memory
from vlbench.train.training_module import StageCallback, VLMTrainingModule, freeze_untrained_parts

CANDIDATE_STEPS = 16  # steps of a stage among which the longest is taken
TIMED_STEPS = 2  # steps after the longest, which comes first and is slower than those to come


class StageMeasurement(NamedTuple):
    """What a stage takes; numbers are of this machine."""

    stage_name: str
    total_steps: int
    """Optimizer steps of the stage."""
    longest_tokens: int
    """Positions of its longest step."""
    micro_batches: int
    """Micro-batches of that step."""
    loss: float
    """Loss of the last step that was tried."""
    step_seconds: float
    """Of a typical optimizer step."""
    peak_bytes: int
    """Peak in bytes, up to and with this stage."""


def dry_run(recipe: Recipe, stage_runs: list[StageRun]) -> int:
    """Do a few optimizer steps per stage and keep nothing; return the exit code."""
    seconds = 0.0
    for one in measure_stages(recipe, stage_runs):
        print(
            f"{one.stage_name}: {one.longest_tokens} tokens in {one.micro_batches} micro-batches, "
            f"loss {one.loss:.3f}, {one.step_seconds:.2g} s a step, "
            f"peak memory {run_report.format_bytes(one.peak_bytes)}"
        )
        seconds += one.step_seconds * one.total_steps
    print(
        "dry run done, nothing was kept; training will take about "
        f"{run_report.format_duration(seconds)}"
    )
    return 0


def measure_stages(recipe: Recipe, stage_runs: list[StageRun]) -> Iterator[StageMeasurement]:
    """Try every stage: its longest step, then two as they come."""
    check_data(recipe, stage_runs)
    check_stage_shapes(recipe, stage_runs)
    vlm, _ = build_or_resume_model(recipe, stage_runs, None)
    run_report.show_weight_origins(vlm.weight_origins, recipe.seed)
    for leg in stage_runs:
        if not leg.total_steps:
            continue
        vlm.set_image_size(leg.stage.image_size)
        freeze_untrained_parts(vlm.model, leg.stage)
        held = hold_frozen_bf16(recipe, vlm.model)
        steps = replace(
            build_stage_steps(vlm, leg),
            rank=collectives.rank(),
            world_size=collectives.world_size(),
        )
        set_activation_checkpointing(recipe, vlm.model, steps, root_device(recipe))
        candidates = [steps[n] for n in range(min(CANDIDATE_STEPS, leg.total_steps))]
        longest = max(candidates, key=_count_positions)
        if not collectives.all_gather_numbers([_count_positions(longest)]).sum():
            bad = [str(one) for step in candidates for one in step.bad_samples[:1]]
            raise UserError(
                f"stage {leg.name}: its first {len(candidates)} steps have nothing to learn from: "
                f"{bad[0] if bad else 'no sample has a picture, and the stage learns captions'}"
            )
        tried = [longest, *candidates[:TIMED_STEPS]]
        clock = _StepClock()
        module = VLMTrainingModule(vlm.model, leg.stage, len(tried), 0, recipe.seed, [clock])
        with CompiledBlocks(vlm.model, recipe.trainer.compile), explain_stage_errors(leg):
            loader: DataLoader = DataLoader(tried, batch_size=None)  # type: ignore[arg-type]
            build_trainer(recipe, [], None).fit(module, loader)
        held.restore_float32()
        if is_fsdp_sharded(recipe):
            vlm, _ = build_or_resume_model(recipe, stage_runs, None)  # whole again
        yield StageMeasurement(
            leg.name,
            leg.total_steps,
            _count_positions(longest),
            len(longest.micro_batches),
            module.report.loss,
            (clock.end_times[-1] - clock.end_times[0]) / (len(tried) - 1),
            peak_memory(),
        )


class _StepClock(StageCallback):
    """Note when every step ends."""

    def __init__(self) -> None:
        self.end_times: list[float] = []

    def on_step_end(self, training: VLMTrainingModule, step: OptimizerStep) -> None:
        """Note the time."""
        self.end_times.append(time.monotonic())


def _count_positions(step: OptimizerStep) -> int:
    return sum(sum(lengths) for batch in step.micro_batches for lengths in batch.sample_lengths)
