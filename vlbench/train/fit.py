"""Fit a recipe: its stages one after the other, resumed where they stopped, then the results."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from vlbench.config.schema import PART_NAMES, Recipe, StageConfig
from vlbench.data.data_sources import stage_data
from vlbench.distributed import collectives
from vlbench.distributed.launcher import final_exit_code, isolate_data_worker, silent_exit_code
from vlbench.distributed.process_group import (
    is_fsdp_sharded,
    join_process_group,
    leave_process_group,
)
from vlbench.errors import BadSample, UserError
from vlbench.model import lora_adapters
from vlbench.model.build_vlm import build_vlm
from vlbench.model.compile_blocks import CompiledBlocks
from vlbench.model.frozen_bf16 import FrozenBF16
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.vlm import VLM
from vlbench.model.weights.tensor_groups import move_and_cast
from vlbench.process_settings import preserve_process_settings
from vlbench.train import checkpoint_files, run_report
from vlbench.train.auto_checkpointing import set_activation_checkpointing
from vlbench.train.callbacks import (
    CheckpointCallback,
    GracefulStop,
    NonFiniteGuard,
    QuarantineCallback,
    ValidationCallback,
    quarantine_samples,
)
from vlbench.train.checkpoint_files import RunPosition
from vlbench.train.feature_cache import cache_features
from vlbench.train.lightning_trainer import (
    build_trainer,
    explain_stage_errors,
    quiet_lightning,
    root_device,
)
from vlbench.train.loggers import build_loggers
from vlbench.train.progress_logging import ProgressCallback, truncate_metrics
from vlbench.train.resume import build_from_init, load_checkpoint
from vlbench.train.run_folder import RunFolder, open_run
from vlbench.train.shape_checks import check_init_weights, check_stage_shapes
from vlbench.train.stage_plan import (
    StageRun,
    build_stage_steps,
    check_data,
    held_out_batches,
    plan_stage_runs,
)
from vlbench.train.training_module import (
    StageCallback,
    VLMTrainingModule,
    check_objective,
    freeze_untrained_parts,
    trained_parameters,
)


def fit(recipe: Recipe) -> int:
    """Train the stages of `recipe`, evaluate, and say what to try next; return the exit code."""
    with preserve_process_settings(), quiet_lightning(), join_process_group(recipe):
        code = _fit_recipe(recipe)
        if not collectives.is_rank_zero():
            return silent_exit_code(code)
        others = collectives.is_distributed()
    return final_exit_code(code) if others else code


def _fit_recipe(recipe: Recipe) -> int:
    legs = collectives.call_on_all_ranks(lambda: plan_stage_runs(recipe))
    if recipe.dry_run:
        from vlbench.train.dry_run import dry_run

        return dry_run(recipe, legs)
    run = collectives.call_on_rank_zero(lambda: check_and_open_run(recipe, legs))
    if run.is_finished:
        print(f"{run.folder} is finished; these are its results.")
        return run_report.show_results(run)
    run_report.show_run_start(recipe, run, [(leg.name, leg.stage, leg.total_steps) for leg in legs])
    with GracefulStop() as interrupts:
        return StageRunner(recipe, run, legs, interrupts).run_stages()


def check_and_open_run(recipe: Recipe, stage_runs: list[StageRun]) -> RunFolder:
    """Look at data and sizes unless that was done before, and return the open folder of the run."""
    for leg in stage_runs:
        if leg.stage.global_batch_size < collectives.world_size():
            raise UserError(
                f"stages.{leg.name}.global_batch_size is {leg.stage.global_batch_size}, fewer "
                f"than the {collectives.world_size()} "
                "processes: some would have nothing to do"
            )
    bad: list[BadSample] = []
    if not (recipe.run and RunFolder(Path(recipe.run)).is_finished):
        bad = check_data(recipe, stage_runs)  # before there is a folder
    if not (recipe.run and RunFolder(Path(recipe.run)).latest_position):
        check_stage_shapes(recipe, stage_runs)
        check_init_weights(recipe, stage_runs[0].stage)
    run = open_run(recipe)
    quarantine_samples(run, bad)
    return run


@dataclass
class StageRunner:
    """A recipe being fitted in its run folder."""

    recipe: Recipe
    run: RunFolder
    stage_runs: list[StageRun]
    graceful_stop: GracefulStop
    seen: dict[str, int] = field(default_factory=dict)
    """Samples, images and tokens that were learned from by now."""
    started_at: float = field(default_factory=time.monotonic)
    earlier_seconds: float = 0.0
    """Seconds that the run had taken when it was stopped."""

    def elapsed_seconds(self) -> float:
        """Return how many seconds the run has taken."""
        return self.earlier_seconds + time.monotonic() - self.started_at

    def run_stages(self) -> int:
        """Train what is left, evaluate, report; return the exit code."""
        try:
            vlm, start = collectives.call_on_all_ranks(
                lambda: build_or_resume_model(self.recipe, self.stage_runs, self.run)
            )
            collectives.call_on_rank_zero(
                lambda: self.run.record_weight_origins(vlm.weight_origins)
            )
        except UserError:
            self.run.discard_if_empty()  # the same command can be mended and repeated
            raise
        run_report.show_weight_origins(vlm.weight_origins, self.recipe.seed)
        self.seen, self.earlier_seconds = start.seen or {}, start.seconds or 0.0
        for leg in self.stage_runs[start.stage :]:
            done = start.step if leg.stage_index == start.stage else 0
            vlm.set_image_size(leg.stage.image_size)
            if done < leg.total_steps:
                self.train_stage(vlm, leg, done)
            if self.graceful_stop.sync_stop_request()[0]:
                return run_report.show_interrupted(self.run, self.graceful_stop.stop_reason)
            if done < leg.total_steps and is_fsdp_sharded(self.recipe):
                vlm = collectives.call_on_all_ranks(
                    self.load_newest_model
                )  # whole again: the next stage changes it
        if not collectives.is_rank_zero():
            return 0
        if is_fsdp_sharded(self.recipe):
            move_and_cast(vlm.language, torch.float32, "cpu")  # it is still in its file
        leave_process_group()
        return self.evaluate_and_report(vlm)

    def load_newest_model(self) -> LoadedVLM:
        """Return the model of the newest checkpoint."""
        assert self.run.latest_position is not None
        return load_checkpoint(
            self.run.checkpoint_path(self.run.latest_position),
            self.recipe,
            mmap_language=is_fsdp_sharded(self.recipe),
        )

    def train_stage(self, vlm: LoadedVLM, stage_run: StageRun, steps_done: int) -> None:
        """Run one stage after its first `done` steps, to its end or until somebody stops it."""
        torch.manual_seed(self.recipe.seed)  # of what the connector builds for the stage alone
        freeze_untrained_parts(vlm.model, stage_run.stage)
        held = hold_frozen_bf16(self.recipe, vlm.model)
        steps = replace(
            build_stage_steps(vlm, stage_run),
            rank=collectives.rank(),
            world_size=collectives.world_size(),
        )
        how = set_activation_checkpointing(self.recipe, vlm.model, steps, root_device(self.recipe))
        run_report.show_stage(
            stage_run.name, stage_run.stage, stage_run.total_steps, steps_done, vlm.model
        )
        if self.recipe.activation_checkpointing == "auto":
            print(f"  activation_checkpointing=auto: {how}")
        offset = (
            sum(other.total_steps for other in self.stage_runs[: stage_run.stage_index])
            + steps_done
        )
        state = None
        if steps_done:
            position = RunPosition(stage_run.stage_index, stage_run.name, steps_done)
            state = checkpoint_files.read_optimizer_state(self.run.checkpoint_path(position))
        training = VLMTrainingModule(
            vlm.model,
            stage_run.stage,
            stage_run.total_steps,
            steps_done,
            self.recipe.seed,
            self.build_callbacks(vlm, stage_run, steps_done),
            state,
            self.seen,
        )
        loggers = build_loggers(self.recipe, self.run, offset) if collectives.is_rank_zero() else []
        trainer = build_trainer(self.recipe, loggers, self.run.folder, [self.graceful_stop])
        workers = stage_data(self.recipe.data, stage_run.stage).workers
        cache = self.recipe.trainer.feature_cache
        if cache and "vision" not in stage_run.stage.trained_parts:
            stop = self.graceful_stop.is_stop_requested
            steps.feature_store = cache_features(vlm, steps, Path(cache), trainer, workers, stop)
        loader: DataLoader = DataLoader(
            steps,
            sampler=range(steps_done, stage_run.total_steps),
            batch_size=None,
            num_workers=workers,
            worker_init_fn=isolate_data_worker,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )
        with (
            CompiledBlocks(vlm.model, self.recipe.trainer.compile),
            explain_stage_errors(stage_run),
        ):
            trainer.fit(training, loader)
        held.restore_float32()
        self.seen = training.seen

    def build_callbacks(
        self, vlm: LoadedVLM, stage_run: StageRun, steps_done: int
    ) -> list[StageCallback]:
        """Return what looks on while a stage trains, in the order of looking."""
        settings, log = self.recipe.trainer, self.recipe.log
        parts = self.checkpoint_parts(stage_run)
        saving = CheckpointCallback(
            vlm,
            self.run,
            (stage_run.stage_index, stage_run.name),
            parts,
            settings.checkpoint_every,
            settings.keep_last_checkpoints,
            self.graceful_stop,
            self.elapsed_seconds,
        )
        run_report.show_disk_usage(
            vlm.model, parts, settings.keep_last_checkpoints, self.run.checkpoints_folder
        )
        held_out = ValidationCallback(
            held_out_batches(self.recipe, vlm, stage_run), log.evaluate_every, saving
        )
        metrics = self.run.folder / "metrics.csv" if collectives.is_rank_zero() else None
        if metrics:
            truncate_metrics(
                metrics, [other.name for other in self.stage_runs], stage_run.name, steps_done
            )
        offset = sum(other.total_steps for other in self.stage_runs[: stage_run.stage_index])
        on_bad_sample = stage_data(self.recipe.data, stage_run.stage).on_bad_sample
        return [
            held_out,
            NonFiniteGuard(stage_run.name, settings.max_nonfinite_steps, run_report.print_status),
            QuarantineCallback(self.run, on_bad_sample, stage_run.data),
            ProgressCallback(stage_run.name, offset, log.every_n_steps, metrics, held_out),
            saving,
        ]

    def checkpoint_parts(self, stage_run: StageRun) -> list[str]:
        """Return what a checkpoint must hold: all that is trained up to and with `leg`, or random.

        Of a model that began with `init` that is everything.
        """
        legs = self.stage_runs[: stage_run.stage_index + 1]
        trained = {
            part for part in PART_NAMES if is_part_changed(part, [other.stage for other in legs])
        }
        trained.add("connector")  # no file has what it begins with
        if self.recipe.init:
            trained |= {"vision", "connector", "language"}
        for part in ("vision", "language"):
            if getattr(self.recipe, part).weights == "random":  # no file has them
                trained.add(part)
        return [part for part in ("vision", "connector", "language") if part in trained]

    def evaluate_and_report(self, vlm: LoadedVLM) -> int:
        """Evaluate the trained model, write results and examples, and print them."""
        from vlbench.evaluate.run_results import write_results

        if self.run.latest_position is None:  # nothing was trained; the model is kept all the same
            last = self.stage_runs[-1]
            position = RunPosition(last.stage_index, last.name, 0)
            parts = self.checkpoint_parts(last)
            where, recipe = self.run.checkpoints_folder, self.run.recipe_file
            checkpoint_files.CheckpointWriter(
                where, position, vlm, parts, None, recipe
            ).finish_writing()
        vlm.model.requires_grad_(False)
        hold_frozen_bf16(
            self.recipe, vlm.model
        )  # what fitted into memory while it was trained shall still fit
        vlm.to(root_device(self.recipe))  # Lightning took it away
        done = write_results(
            self.recipe,
            self.run,
            vlm,
            self.graceful_stop.is_stop_requested,
            self.elapsed_seconds,
        )
        if not done:
            return run_report.show_interrupted(self.run, self.graceful_stop.stop_reason)
        return run_report.show_results(self.run)


def build_or_resume_model(
    recipe: Recipe, stage_runs: list[StageRun], run: RunFolder | None
) -> tuple[LoadedVLM, RunPosition]:
    """Build the model where training begins or goes on, with the newest weights of the run."""
    latest = run.latest_position if run else None
    start = latest or RunPosition(0, stage_runs[0].name, 0)
    stage = stage_runs[start.stage].stage
    if run and latest:
        vlm = load_checkpoint(
            run.checkpoint_path(latest), recipe, mmap_language=is_fsdp_sharded(recipe)
        )
        print(f"resuming {run.folder} after step {latest.step} of {latest.name}")
    elif recipe.init:
        vlm = build_from_init(recipe, stage, is_fsdp_sharded(recipe))
    else:
        vlm = build_vlm(recipe, stage.image_size, stage.objective, is_fsdp_sharded(recipe))
    vlm.processor = vlm.processor.with_draft_decoding(recipe.data.decode == "draft")
    for leg in stage_runs:
        check_objective(vlm.model, leg.name, leg.stage)
        check_trainable_params(vlm.model, leg)
        for part, how in leg.stage.trained_parts.items():
            if how.lora:
                name = f"stages.{leg.name}.train.{part}"
                lora_adapters.check_adapters(
                    getattr(vlm.model, part), name, how.lora.targets, how.lora.bits
                )
    return vlm, start


def check_trainable_params(vlm: VLM, stage_run: StageRun) -> None:
    """Refuse a stage that trains only parts without a parameter, as a connector of means alone."""
    ways = stage_run.stage.trained_parts.items()
    if stage_run.total_steps and not any(
        how.lora or trained_parameters(vlm, name, how) for name, how in ways
    ):
        parts = ", ".join(stage_run.stage.trained_parts)
        raise UserError(
            f"stages.{stage_run.name}.train names {parts}, which has no parameters here: "
            "nothing would "
            "be trained; train another part, or leave the stage out"
        )


def hold_frozen_bf16(recipe: Recipe, vlm: VLM) -> FrozenBF16:
    """Hold frozen weights in 16 bits where training rounds them so; shards need a single type."""
    return FrozenBF16(vlm, recipe.precision == "bf16" and not is_fsdp_sharded(recipe))


def is_part_changed(part: str, stages: list[StageConfig]) -> bool:
    """Tell whether stages change the weights of `part`: adapters do when others replace them."""
    ways = [stage.trained_parts[part].lora for stage in stages if part in stage.trained_parts]
    return any(way is None for way in ways) or any(way != ways[0] for way in ways)
