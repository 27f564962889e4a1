"""Lightning callbacks of a stage: graceful stop, checkpoints, and held-out loss.

Progress lines are in `progress_logging`, bad samples in `quarantine`, steps with a NaN or infinite
loss in `nonfinite_guard`, callbacks that a recipe names in `user_callbacks`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any, cast

import lightning.pytorch as pl
import torch

from vlbench.data.optimizer_step import OptimizerStep
from vlbench.data.packing import PackedBatch
from vlbench.distributed import collectives
from vlbench.distributed.launcher import is_launcher_gone
from vlbench.model.contrastive_loss import add_contrast_pools
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.vlm import VLM
from vlbench.stop_signals import handle_stop_signals
from vlbench.train import checkpoint_files, checkpoint_pruning
from vlbench.train.checkpoint_files import RunPosition
from vlbench.train.run_folder import RunFolder
from vlbench.train.training_module import VLMTrainingModule

MAX_REPEATED_SHARE = 0.05  # share of a stage's steps that may be repeated after a kill
MAX_SAVING_SHARE = 0.05  # share of the time that saving every so many seconds may take
HELD_OUT_SEED = 0  # seeds what is random in a connector's own loss: the same at every evaluation


class StageCallback(pl.Callback):
    """A Lightning callback whose hooks are given our module and the optimizer step."""

    def on_stage_start(self, training: VLMTrainingModule) -> None:
        """Called before the first step."""

    def on_step_end(self, training: VLMTrainingModule, step: OptimizerStep) -> None:
        """Called after every optimizer step; `training.report` says how it went."""

    def on_stage_end(self, training: VLMTrainingModule) -> None:
        """Called after the last step, or when training is stopped; not after an exception."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the stage."""
        self.on_stage_start(cast(VLMTrainingModule, pl_module))

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: OptimizerStep,
        batch_idx: int,
    ) -> None:
        """End the step."""
        self.on_step_end(cast(VLMTrainingModule, pl_module), batch)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the stage."""
        self.on_stage_end(cast(VLMTrainingModule, pl_module))


class GracefulStop(pl.Callback):
    """Turn Ctrl-C, SIGTERM and SIGHUP into a stop after the running step; a second Ctrl-C kills.

    In a thread other than the main one no signals arrive, and training goes on to its end.
    """

    def __init__(self) -> None:
        """Signals are caught from `with` on."""
        self.stop_reason = ""
        self._terminal_descriptors: list[int] = []

    def __enter__(self) -> GracefulStop:
        self._terminal_descriptors = [number for number in (1, 2) if os.isatty(number)]
        self._restore_handlers = handle_stop_signals(self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore_handlers()

    def is_stop_requested(self) -> bool:
        """Tell whether this process was asked to stop."""
        return bool(self.stop_reason)

    def sync_stop_request(self, is_save_due: bool = False) -> tuple[bool, bool]:
        """Return whether any process was asked to stop, and `is_save_due` of the first process.

        Every process has to call it at the same time.
        """
        if is_launcher_gone():
            self.stop_reason = self.stop_reason or "the end of its launcher"
        flags = collectives.all_gather_numbers([bool(self.stop_reason), is_save_due])
        should_stop = bool(flags[:, 0].any())
        if should_stop and collectives.is_distributed():
            self.stop_reason = next(filter(None, collectives.all_gather_objects(self.stop_reason)))
        return should_stop, bool(flags[0, 1])

    def _on_signal(self, signum: int, _: object) -> None:
        if self.stop_reason and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop_reason = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
        if signum == signal.SIGHUP:
            self._leave_closed_terminal()

    def _leave_closed_terminal(self) -> None:
        """Discard what is printed from now on, if the terminal is gone: it would be an error."""
        for descriptor in self._terminal_descriptors:
            try:
                os.write(descriptor, b"\n")
            except OSError:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, descriptor)
                os.close(null)


class CheckpointCallback(StageCallback):
    """Write checkpoints: every 60 s or 5 % of the steps, at the end, and when asked to stop.

    Weights are copied while the next step's gradients are computed, and written after that.

    If writing them takes more than 5 % of the time, the seconds between them become more.
    """

    def __init__(
        self,
        vlm: LoadedVLM,
        run: RunFolder,
        stage_id: tuple[int, str],
        parts: list[str],
        interval_seconds: float,
        keep_last_checkpoints: int,
        graceful_stop: GracefulStop,
        elapsed_seconds: Callable[[], float],
        copies_beside_training: bool = True,
    ) -> None:
        """Write the checkpoints of one stage.

        Args:
            vlm: The model that is trained, with its processor.
            run: The run that they belong to.
            stage_id: Index and name of the stage.
            parts: The parts of the model that a checkpoint holds.
            interval_seconds: Most seconds between two checkpoints, if writing is fast.
            keep_last_checkpoints: How many stay, beside the best and the last of each stage.
            graceful_stop: Whether the run was asked to stop.
            elapsed_seconds: Returns how many seconds the run has taken.
            copies_beside_training: Whether nothing but the optimizer changes weights, so that they
                may be copied until its next step; else they are copied at once.
        """
        self.copies_beside_training = copies_beside_training
        self.vlm, self.run, self.stage_id, self.parts = vlm, run, stage_id, parts
        self.interval_seconds = interval_seconds
        self.keep_last_checkpoints = keep_last_checkpoints
        self.graceful_stop, self.elapsed_seconds = graceful_stop, elapsed_seconds
        self.saved_at, self.save_seconds = time.monotonic(), 0.0
        self.writer: checkpoint_files.CheckpointWriter | None = None
        self.losses_by_step: dict[int, float] = {}
        """Held-out loss by step, filled by `ValidationCallback`; it decides which one is best."""

    def on_step_end(self, training: VLMTrainingModule, step: OptimizerStep) -> None:
        """Save if it is time and stop if it was asked for, in all processes after the same step."""
        steps_done = training.steps_done
        every_n_steps = max(1, int(training.total_steps * MAX_REPEATED_SHARE))
        is_late = time.monotonic() - self.saved_at > max(
            self.interval_seconds, self.save_seconds / MAX_SAVING_SHARE
        )
        should_stop, is_late = self.graceful_stop.sync_stop_request(is_late)
        is_last = steps_done == training.total_steps or should_stop
        if steps_done % every_n_steps == 0 or is_late or is_last:
            self.start_saving(training)
        if self.writer and (is_last or all(collectives.all_gather_objects(self.writer.is_written))):
            self.finish_saving()
        if should_stop:
            training.trainer.should_stop = True

    def start_saving(self, training: VLMTrainingModule) -> None:
        """Start writing a checkpoint of this step; wait for the one before to be written."""
        started_at = time.monotonic()
        if self.writer:
            self.finish_saving()
        position = RunPosition(
            *self.stage_id,
            training.steps_done,
            self.losses_by_step.get(training.steps_done),
            training.seen,
            round(self.elapsed_seconds(), 1),
        )
        self.writer = checkpoint_files.CheckpointWriter(
            self.run.checkpoints_folder,
            position,
            self.vlm,
            self.parts,
            training.trainer.optimizers[0],
            self.run.recipe_file,
        )
        if not self.copies_beside_training:
            self.writer.wait_until_copied()
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - started_at

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Let the weights change only when they have been copied; forward and backward ran by then.

        The seconds that this takes are of the saving.
        """
        if self.writer:
            started_at = time.monotonic()
            self.writer.wait_until_copied()
            self.save_seconds += time.monotonic() - started_at

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Finish the checkpoint that is being written: its step is done, whatever failed later.

        Several processes would wait for each other, and one of them may be gone.
        """
        if self.writer and isinstance(exception, Exception) and not collectives.is_distributed():
            self.finish_saving()

    def finish_saving(self) -> None:
        """Finish the checkpoint that is being written, and remove old ones."""
        writer, self.writer = self.writer, None
        assert writer is not None
        writer.finish_writing()
        collectives.call_on_rank_zero(
            lambda: checkpoint_pruning.prune_checkpoints(
                self.run.checkpoints_folder, self.keep_last_checkpoints
            )
        )


class ValidationCallback(StageCallback):
    """Compute the held-out loss every `every_n_steps` steps and after the last one."""

    def __init__(
        self,
        batches: list[PackedBatch],
        every_n_steps: int,
        checkpoint_callback: CheckpointCallback,
    ) -> None:
        """Use encoded batches; hand losses to the callback that keeps the best checkpoint."""
        self.batches, self.every_n_steps = batches, every_n_steps
        self.checkpoint_callback = checkpoint_callback
        self.latest_losses: dict[str, float] = {}
        """Losses by name after the newest step; empty if they were not computed then."""

    def on_step_end(self, training: VLMTrainingModule, step: OptimizerStep) -> None:
        """Compute the losses if it is time."""
        steps_done = training.steps_done
        is_due = steps_done % self.every_n_steps == 0 or steps_done == training.total_steps
        self.latest_losses = {}
        if is_due and self.batches:
            self.latest_losses = held_out_losses(training.vlm, self.batches)
            self.checkpoint_callback.losses_by_step[steps_done] = self.latest_losses["loss"]


@torch.no_grad()
def held_out_losses(vlm: VLM, batches: list[PackedBatch]) -> dict[str, float]:
    """Return `loss` of `batches`, per supervised token, and each of the connector's own losses.

    In a stage with an objective of the connector's own, `loss` is the sum of those; a contrastive
    loss takes its negatives from all `batches`.
    """
    torch.manual_seed(HELD_OUT_SEED)
    vlm.eval()
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for batch in add_contrast_pools(vlm, batches, all_processes=False):
        out = vlm(batch.to(vlm.device))
        losses = dict(out.extra)
        if out.loss_sum is not None:
            losses["loss"] = (out.loss_sum, torch.tensor(out.tokens))
        for name, (value, count) in losses.items():
            sums[name] = sums.get(name, 0.0) + float(value)
            counts[name] = counts.get(name, 0) + int(count)
    vlm.train()
    means = {name: sums[name] / max(1, counts[name]) for name in sums}
    return {"loss": sum(means.values())} | means
