"""A dry run: a few steps of every stage, the longest first, so that what fails does so at once."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from vlbench.config.model_schema import ModelConfig
from vlbench.config.stage_schema import StageData
from vlbench.data.optimizer_step import OptimizerStep, StepPlan
from vlbench.distributed import collectives
from vlbench.distributed.process_group import join_process_group
from vlbench.errors import BadSample, UserError
from vlbench.process_settings import preserve_process_settings
from vlbench.train import run_report
from vlbench.train.callbacks import StageCallback
from vlbench.train.fit import build_or_resume_model
from vlbench.train.lightning_trainer import explain_stage_errors, quiet_lightning
from vlbench.train.shape_checks import check_stage_shapes
from vlbench.train.stage_plan import StageRun, build_stage_steps, check_data, plan_stage_runs
from vlbench.train.stage_runner import StageRunner
from vlbench.train.throughput import peak_memory
from vlbench.train.training_module import VLMTrainingModule
from vlbench.train.user_callbacks import build_user_callbacks

CANDIDATE_STEPS = 16  # steps of a stage among which the longest is taken
MAX_TRIED_SAMPLES = {"cpu": 64, "cuda": 1024}
"""Of a step, in each process: of a larger batch a part is tried, and the time is told for all."""
TIMED_STEPS = 2  # steps after the longest, which comes first and is slower than those to come


class StageMeasurement(NamedTuple):
    """What a stage takes on this machine."""

    stage_name: str
    total_steps: int
    """Optimizer steps of the stage."""
    longest_tokens: int
    """Positions of the longest step."""
    micro_batches: int
    """Micro-batches of that step."""
    tried_share: float
    """Share of a step's samples that was tried: 1, or less for a very large batch."""
    loss: float
    """Loss of the last step that was tried."""
    step_seconds: float
    """Seconds of a typical optimizer step."""
    peak_bytes: int
    """Peak memory in bytes, from the start of the process to the end of this stage."""
    planned: Mapping[str, int]
    """Samples, and what of them is cut off at `language.max_length`, of its first steps."""


def dry_run(
    runner: StageRunner, model: ModelConfig, stages: Sequence[StageData], last: StageData
) -> int:
    """Do a few optimizer steps per stage in this process, keep nothing; return the exit code."""
    with preserve_process_settings(), quiet_lightning(), join_process_group(runner.trainer_config):
        stage_runs = collectives.call_on_rank_zero_first(lambda: plan_stage_runs(stages, last))
        return dry_run_stages(runner, model, stage_runs)


def dry_run_stages(runner: StageRunner, model: ModelConfig, stage_runs: list[StageRun]) -> int:
    """Do a few optimizer steps per stage and print what they took; return the exit code."""
    total_seconds = 0.0
    for measured in measure_stages(runner, model, stage_runs):
        print(
            f"{measured.stage_name}: {measured.longest_tokens} tokens in "
            f"{measured.micro_batches} micro-batches, {_describe_share(measured.tried_share)}"
            f"loss {measured.loss:.3f}, "
            f"{measured.step_seconds:.2g} s a step, "
            f"peak memory {run_report.format_bytes(measured.peak_bytes)}"
        )
        run_report.show_truncation(measured.stage_name, {}, measured.planned)
        total_seconds += measured.step_seconds * measured.total_steps
    print(
        "dry run done, nothing was kept; training will take about "
        f"{run_report.format_duration(total_seconds)}"
    )
    return 0


def _describe_share(tried_share: float) -> str:
    return "" if tried_share == 1 else f"which is {tried_share:.2g} of a step, "


def measure_stages(
    runner: StageRunner, model: ModelConfig, stage_runs: list[StageRun]
) -> Iterator[StageMeasurement]:
    """Try every stage: its longest step, then two as they come."""
    collectives.call_on_rank_zero(lambda: check_data(stage_runs))
    check_stage_shapes(model, stage_runs)
    user_callbacks = build_user_callbacks(runner.trainer_config.callbacks)
    vlm, _ = build_or_resume_model(model, stage_runs, runner.is_sharded)
    run_report.show_weight_origins(vlm.weight_origins, runner.seed)
    run_report.show_inputs(vlm.processor)
    for stage_run in stage_runs:
        if not stage_run.total_steps:
            continue
        stage_run, tried_share = _limit_step(stage_run, vlm.model.device.type)
        vlm.set_image_size(stage_run.stage.image_size)
        with runner.prepare_stage(vlm.model, stage_run.stage):
            stage_run.settled_row_tokens = runner.choose_row_tokens(vlm.model)
            steps = build_stage_steps(vlm.processor, stage_run)
            with explain_stage_errors(stage_run.name, stage_run.stage):
                runner.set_activation_checkpointing(vlm.model, steps)
            plans = [steps.plan_step(n) for n in range(min(CANDIDATE_STEPS, stage_run.total_steps))]
            longest = max(plans, key=lambda plan: plan.token_count)
            timed_steps = TIMED_STEPS if tried_share == 1 else 1
            tried = [longest.index, *range(len(plans))[:timed_steps]]
            clock = _StepClock()
            module = runner.train_stage(
                vlm.model,
                stage_run.name,
                stage_run.stage,
                steps,
                len(tried),
                step_numbers=tried,
                callbacks=[*user_callbacks, clock],
            )
        bad_samples = clock.bad_samples + [bad for plan in plans for bad in plan.bad_samples]
        _check_not_empty(stage_run.name, len(plans), module.seen["samples"], bad_samples)
        loss = module.report.loss
        if runner.is_sharded:  # unsharded again, as the next stage needs it
            del vlm, module
            gc.collect()  # shards are in cycles, and would stay on the GPU
            vlm, _ = build_or_resume_model(model, stage_runs, runner.is_sharded)
        yield StageMeasurement(
            stage_run.name,
            stage_run.total_steps,
            longest.token_count,
            len(longest.rows),
            tried_share,
            loss,
            (clock.end_times[-1] - clock.end_times[0]) / (len(tried) - 1) / tried_share,
            peak_memory(),
            _sum_plans(plans),
        )


def _sum_plans(plans: Sequence[StepPlan]) -> dict[str, int]:
    """Return how many samples steps have, and how many of them and of their tokens are cut."""
    rows = [row for plan in plans for row in plan.rows]
    return {
        "samples": sum(len(row.stream_index) for row in rows),
        "truncated_samples": sum(row.truncated_samples for row in rows),
        "lost_supervised_tokens": sum(row.lost_supervised_tokens for row in rows),
        "reduced_samples": sum(row.reduced_samples for row in rows),
    }


def _limit_step(stage_run: StageRun, device_type: str) -> tuple[StageRun, float]:
    """Return a stage whose steps are not too large to be tried, and the share that they are."""
    size = stage_run.stage.global_batch_size
    most = MAX_TRIED_SAMPLES.get(device_type, MAX_TRIED_SAMPLES["cpu"]) * collectives.world_size()
    if size <= most:
        return stage_run, 1.0
    stage = stage_run.stage.model_copy(update={"global_batch_size": most})
    return replace(stage_run, stage=stage), most / size


class _StepClock(StageCallback):
    """Note when every step ends, and the bad samples that it met."""

    def __init__(self) -> None:
        self.end_times: list[float] = []
        self.bad_samples: list[BadSample] = []

    def on_step_end(self, training: VLMTrainingModule, step: OptimizerStep) -> None:
        """Note the time and the bad samples."""
        self.end_times.append(time.monotonic())
        self.bad_samples += step.bad_samples


def _check_not_empty(
    stage_name: str, step_count: int, learned_samples: int, bad_samples: list[BadSample]
) -> None:
    """Raise a UserError if no process has learned anything from the first steps of a stage."""
    if learned_samples:
        return
    reason = (
        str(bad_samples[0])
        if bad_samples
        else "no sample has an image, and the stage learns captions"
    )
    raise UserError(
        f"stage {stage_name}: its first {step_count} steps have nothing to learn from: {reason}"
    )
