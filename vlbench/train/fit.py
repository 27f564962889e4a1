"""Train the stages of a recipe one after the other, resumed where a run stopped."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch

from vlbench.config.key_types import ENCODER_PARTS
from vlbench.config.model_schema import ModelConfig
from vlbench.config.schema import LoggingConfig, Recipe
from vlbench.distributed import collectives
from vlbench.distributed.process_group import leave_process_group
from vlbench.errors import BadSample, UserError
from vlbench.model.build_vlm import build_vlm
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.weights.tensor_groups import move_and_cast
from vlbench.train import checkpoint_files, run_report
from vlbench.train.answering_model import place_for_answers
from vlbench.train.callbacks import CheckpointCallback, GracefulStop, ValidationCallback
from vlbench.train.checkpoint_files import RunPosition
from vlbench.train.connector_guard import ConnectorGuard
from vlbench.train.core_sharing_notice import CoreSharingNotice
from vlbench.train.lightning_trainer import build_loggers, explain_stage_errors
from vlbench.train.load_memory import describe_small_memory
from vlbench.train.nonfinite_guard import NonFiniteGuard
from vlbench.train.progress_logging import ProgressCallback, truncate_metrics
from vlbench.train.quarantine import QuarantineCallback, quarantine_samples
from vlbench.train.resume import build_from_init, load_checkpoint
from vlbench.train.run_data import keep_data
from vlbench.train.run_folder import RunFolder, open_run
from vlbench.train.shape_checks import check_init_weights, check_stage_shapes
from vlbench.train.stage_plan import StageRun, build_stage_steps, check_data, held_out_batches
from vlbench.train.stage_runner import StageRunner
from vlbench.train.trainable_parts import (
    check_four_bit_stages,
    check_trainable_stage,
    parts_to_save,
)
from vlbench.train.view_report import show_views


def check_and_open_run(
    recipe: Recipe, stage_runs: list[StageRun], held_locks: contextlib.ExitStack
) -> RunFolder:
    """Check data and shapes unless that was done before, and return the opened run folder.

    A run that goes on has the data that it has trained on (`keep_data`). Its lock is held
    by `held_locks`, of a run that is there before anything is checked.
    """
    for stage_run in stage_runs:
        if stage_run.stage.global_batch_size < collectives.world_size():
            raise UserError(
                f"stages.{stage_run.name}.global_batch_size is "
                f"{stage_run.stage.global_batch_size}, fewer than the {collectives.world_size()} "
                "processes: some would have nothing to do"
            )
    run = None
    if recipe.run and RunFolder(Path(recipe.run)).recipe_file.is_file():
        run = open_run(recipe, held_locks)
        keep_data(run, stage_runs)
    bad_samples: list[BadSample] = []
    if not (recipe.run and RunFolder(Path(recipe.run)).is_finished):
        bad_samples = check_data(stage_runs)  # before there is a folder
    if not (recipe.run and RunFolder(Path(recipe.run)).latest_position):
        check_stage_shapes(recipe.model, stage_runs)
        check_init_weights(recipe.model, stage_runs[0].stage)
    if run is None:  # a new one: after the checks
        run = open_run(recipe, held_locks)
        keep_data(run, stage_runs)
    quarantine_samples(run, bad_samples)
    return run


class RunTraining:
    """The training of one run: all stages that are left of it."""

    def __init__(
        self,
        stage_runner: StageRunner,
        model_config: ModelConfig,
        log_config: LoggingConfig,
        run: RunFolder,
        stage_runs: list[StageRun],
        graceful_stop: GracefulStop,
        user_callbacks: Sequence[pl.Callback] = (),
    ) -> None:
        """Prepare to train.

        Args:
            stage_runner: What trains each stage.
            model_config: What the model is built from.
            log_config: Logs, and evaluations during training.
            run: The folder that checkpoints and metrics are written to.
            stage_runs: The stages, in order.
            graceful_stop: What tells that training is to be stopped.
            user_callbacks: Those that the recipe names.
        """
        self.stage_runner, self.run, self.stage_runs = stage_runner, run, stage_runs
        self.model_config, self.log_config = model_config, log_config
        self.graceful_stop, self.user_callbacks = graceful_stop, user_callbacks
        self.core_sharing_notice = CoreSharingNotice(run_report.print_status)
        self.seen: dict[str, int] = {}
        """The `SEEN_COUNTS` of what the run has trained on."""
        self.started_at = time.monotonic()
        self.earlier_seconds = 0.0
        """Seconds that the run had taken when it was stopped."""

    def elapsed_seconds(self) -> float:
        """Return how many seconds the run has taken, without the time in which it was stopped."""
        return self.earlier_seconds + time.monotonic() - self.started_at

    def tell_small_memory(self, latest: RunPosition | None) -> None:
        """Print a line if this machine has too little memory to load the model.

        A run that goes on reads its newest checkpoint, and no more what it began with.
        """
        if self.stage_runner.is_sharded:
            return
        processes = min(collectives.world_size(), self.stage_runner.trainer_config.devices)
        config = self.model_config
        if latest is not None:
            config = replace(config, init=str(self.run.checkpoint_path(latest)))
        if caution := describe_small_memory(config, processes):
            run_report.print_status(caution)

    def load_model(self) -> tuple[LoadedVLM, RunPosition]:
        """Return the model where training begins or goes on, and its position."""
        try:
            # all take the one that the first process sees: others may see the folder as it was
            latest = collectives.call_on_rank_zero(lambda: self.run.latest_position)
            collectives.call_on_rank_zero(lambda: self.tell_small_memory(latest))
            vlm, position = collectives.call_on_all_ranks(
                lambda: build_or_resume_model(
                    self.model_config,
                    self.stage_runs,
                    self.stage_runner.is_sharded,
                    self.run.checkpoint_path(latest) if latest else None,
                    latest,
                )
            )
            collectives.call_on_rank_zero(
                lambda: self.run.record_weight_origins(vlm.weight_origins)
            )
        except UserError:
            self.run.discard_if_empty()  # so that the command can be repeated when it is mended
            raise
        return vlm, position

    def train_stages(self) -> LoadedVLM | None:
        """Train the stages that are left; return the model, or None if training was stopped."""
        vlm, position = self.load_model()
        run_report.show_weight_origins(vlm.weight_origins, self.model_config.seed)
        run_report.show_inputs(vlm.processor)
        self.seen, self.earlier_seconds = position.seen or {}, position.seconds or 0.0
        if self.graceful_stop.sync_stop_request()[0]:  # while weights were fetched or loaded
            return None
        for stage_run in self.stage_runs[position.stage :]:
            steps_done = position.step if stage_run.stage_index == position.stage else 0
            vlm.set_image_size(stage_run.stage.image_size)
            if steps_done < stage_run.total_steps:
                self.train_stage(vlm, stage_run, steps_done)
            if self.graceful_stop.sync_stop_request()[0]:
                return None
            if steps_done < stage_run.total_steps and collectives.is_distributed():
                if self.stage_runner.is_sharded:
                    del vlm
                gc.collect()  # shards and DDP's buckets are in cycles, and would stay on the GPU
                if self.stage_runner.is_sharded:  # unsharded again, as the next stage needs it
                    vlm = collectives.call_on_all_ranks(partial(self.load_stage_end, stage_run))
        return vlm

    def load_stage_end(self, stage_run: StageRun) -> LoadedVLM:
        """Return the model of the last checkpoint of a stage."""
        position = RunPosition(stage_run.stage_index, stage_run.name, stage_run.total_steps)
        return load_checkpoint(
            self.run.checkpoint_path(position),
            self.model_config,
            mmap_language=self.stage_runner.is_sharded,
        )

    def train_stage(self, vlm: LoadedVLM, stage_run: StageRun, steps_done: int) -> None:
        """Train a stage from step `steps_done` to its end, or until it is stopped."""
        runner, stage = self.stage_runner, stage_run.stage
        workers = stage_run.data_config.workers
        with runner.prepare_stage(vlm.model, stage):
            self.settle_row_tokens(vlm, stage_run)
            steps = build_stage_steps(vlm.processor, stage_run)
            with explain_stage_errors(stage_run.name, stage):
                mode = runner.set_activation_checkpointing(vlm.model, steps)
            run_report.show_stage(
                stage_run.name, stage, stage_run.total_steps, steps_done, vlm.model
            )
            show_views(steps)
            if stage.max_tokens_per_row == "auto":
                print(f"  max_tokens_per_row=auto: {stage_run.row_tokens}")
            if runner.activation_checkpointing == "auto":
                print(f"  activation_checkpointing=auto: {mode}")
            optimizer_state = None
            if steps_done:
                position = RunPosition(stage_run.stage_index, stage_run.name, steps_done)
                checkpoint = self.run.checkpoint_path(position)
                optimizer_state = checkpoint_files.read_optimizer_state(checkpoint)
            callbacks = self.build_callbacks(vlm, stage_run, steps_done)
            loggers = []
            if collectives.is_rank_zero():
                last_kept_step = self.earlier_steps(stage_run) + steps_done
                loggers = build_loggers(self.log_config, self.run, last_kept_step)
            if not stage.trained_parts.keys() & set(ENCODER_PARTS):
                should_stop = self.graceful_stop.is_stop_requested
                runner.cache_features(vlm, steps, workers, should_stop)
            module = runner.train_stage(
                vlm.model,
                stage_run.name,
                stage,
                steps,
                stage_run.total_steps,
                steps_done=steps_done,
                optimizer_state=optimizer_state,
                seen=self.seen,
                callbacks=callbacks,
                loggers=loggers,
                num_workers=workers,
            )
        run_report.show_truncation(stage_run.name, self.seen, module.seen)
        self.seen = module.seen

    def settle_row_tokens(self, vlm: LoadedVLM, stage_run: StageRun) -> None:
        """Choose the length of rows if the recipe leaves it open; a run that goes on keeps it."""
        if stage_run.stage.max_tokens_per_row == "auto":
            chosen = self.stage_runner.choose_row_tokens(vlm.model)
            stage_run.settled_row_tokens = collectives.call_on_rank_zero(
                lambda: self.run.keep_row_tokens(stage_run.name, chosen)
            )

    def earlier_steps(self, stage_run: StageRun) -> int:
        """Return the optimizer steps of all stages before this one."""
        return sum(earlier.total_steps for earlier in self.stage_runs[: stage_run.stage_index])

    def build_callbacks(
        self, vlm: LoadedVLM, stage_run: StageRun, steps_done: int
    ) -> list[pl.Callback]:
        """Return the callbacks of a stage in the order in which they are called.

        Those of the user come first: a checkpoint holds what they change. The guard and the
        quarantine raise before a checkpoint is written.
        """
        trainer_config, log_config = self.stage_runner.trainer_config, self.log_config
        parts = self.checkpoint_parts(stage_run)
        checkpoint_callback = CheckpointCallback(
            vlm,
            self.run,
            (stage_run.stage_index, stage_run.name),
            parts,
            trainer_config.checkpoint_every,
            trainer_config.keep_last_checkpoints,
            self.graceful_stop,
            self.elapsed_seconds,
            copies_beside_training=not self.user_callbacks,
        )
        run_report.show_disk_usage(
            vlm.model, parts, trainer_config.keep_last_checkpoints, self.run.checkpoints_folder
        )
        validation = ValidationCallback(
            held_out_batches(vlm.processor, stage_run, self.stage_runner.seed),
            log_config.evaluate_every,
            checkpoint_callback,
        )
        metrics_file = None
        if collectives.is_rank_zero():
            metrics_file = self.run.folder / "metrics.csv"
            stage_names = [other.name for other in self.stage_runs]
            truncate_metrics(metrics_file, stage_names, stage_run.name, steps_done)
        progress = ProgressCallback(
            stage_run.name,
            self.earlier_steps(stage_run),
            log_config.every_n_steps,
            metrics_file,
            validation,
        )
        max_nonfinite_steps = trainer_config.max_nonfinite_steps
        return [
            self.graceful_stop,
            *self.user_callbacks,
            validation,
            NonFiniteGuard(
                stage_run.name,
                max_nonfinite_steps,
                run_report.print_status,
                self.run.record_divergence,
            ),
            ConnectorGuard(run_report.print_status),
            QuarantineCallback(self.run, stage_run.data_config.on_bad_sample, stage_run.data),
            progress,
            self.core_sharing_notice,
            checkpoint_callback,
        ]

    def checkpoint_parts(self, stage_run: StageRun) -> list[str]:
        """Return the parts that a checkpoint of this stage must hold, so that it stands alone.

        They are what has been trained by then, and what no file has: a connector, and parts with
        random weights. Of a model that began with `init` that is everything.
        """
        always_saved = ["connector"]
        sources = {
            "vision": self.model_config.vision,
            "second_vision": self.model_config.vision.second,
            "language": self.model_config.language,
        }
        for part, source in sources.items():
            if source and (self.model_config.init or source.weights == "random"):
                always_saved.append(part)
        stages = [other.stage for other in self.stage_runs[: stage_run.stage_index + 1]]
        return parts_to_save(stages, always_saved)

    def spent_by_stage(self) -> dict[str, dict[str, float]]:
        """Return the optimizer steps of each stage, and the epochs: passes over its data."""
        return {
            "steps": {one.name: one.total_steps for one in self.stage_runs},
            "epochs": {
                one.name: one.total_steps * one.stage.global_batch_size / len(one.data)
                for one in self.stage_runs
            },
        }

    def finish_training(self, vlm: LoadedVLM) -> None:
        """Leave the other processes, and put the model where questions can be asked.

        If no stage had a step, the model is kept in a checkpoint all the same. Only the first
        process calls it.
        """
        if self.stage_runner.is_sharded:
            move_and_cast(vlm.language, torch.float32, "cpu")  # until now it was in its file
        leave_process_group()
        if self.run.latest_position is None:
            last_run = self.stage_runs[-1]
            checkpoint_files.CheckpointWriter(
                self.run.checkpoints_folder,
                RunPosition(last_run.stage_index, last_run.name, 0),
                vlm,
                self.checkpoint_parts(last_run),
                None,
                self.run.recipe_file,
            ).finish_writing()
        place_for_answers(  # a sharded model was loaded anew
            vlm,
            partial(self.stage_runner.hold_frozen_bf16, vlm.model),
            self.stage_runner.device,
            run_report.print_status,
        )


def build_or_resume_model(
    config: ModelConfig,
    stage_runs: list[StageRun],
    is_sharded: bool,
    checkpoint: Path | None = None,
    latest: RunPosition | None = None,
) -> tuple[LoadedVLM, RunPosition]:
    """Build the model where training begins or goes on, and return it with its position.

    Args:
        config: What the model is built from.
        stage_runs: The stages, in order.
        is_sharded: Whether the language model stays in its files until it is sharded.
        checkpoint: The checkpoint to go on from; None: training begins.
        latest: Its position.
    """
    stages = {stage_run.name: stage_run.stage for stage_run in stage_runs}
    check_four_bit_stages(config, stages, is_sharded)
    position = latest or RunPosition(0, stage_runs[0].name, 0)
    stage = stage_runs[position.stage].stage
    if checkpoint:
        vlm = load_checkpoint(checkpoint, config, mmap_language=is_sharded)
        run = checkpoint.parents[1]
        print(f"resuming {run} after step {position.step} of {position.name}")
    elif config.init:
        vlm = build_from_init(config, stage, is_sharded)
    else:
        vlm = build_vlm(config, stage.image_size, stage.objective, is_sharded)
    vlm.processor = vlm.processor.with_decoding(config.draft_decoding, config.apply_exif)
    if config.draft_decoding and not vlm.processor.transform.can_draft:
        print("data.decode=draft has no effect: images are squashed or cropped, not padded")
    for stage_run in stage_runs:
        check_trainable_stage(vlm.model, stage_run.name, stage_run.stage, stage_run.total_steps)
    return vlm, position
