"""What watches a stage while it trains: saving, interruptions, held-out loss, bad samples."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch

from vlbench.data.batch_sampler import OptimizerStep
from vlbench.data.packing import PackedBatch
from vlbench.data.shuffle import SourceMixture
from vlbench.distributed import collectives
from vlbench.distributed.launcher import is_launcher_gone
from vlbench.errors import BadSample, UserError
from vlbench.model.contrastive_loss import add_contrast_pools
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.vlm import VLM
from vlbench.text_files import append_json_lines, read_json_lines
from vlbench.train import checkpoint_files
from vlbench.train.checkpoint_files import RunPosition
from vlbench.train.run_folder import RunFolder
from vlbench.train.training_module import StageCallback, VLMTrainingModule

MAX_REPEATED_SHARE = 0.05  # share of a stage's steps that may be repeated after a kill
MAX_SAVING_SHARE = 0.05  # share of the time that saving every so many seconds may take
HELD_OUT_SEED = 0  # of what is random in a connector's own loss: the same at every measurement


class GracefulStop(pl.Callback):
    """Turn Ctrl-C and SIGTERM into a wish to stop after the running step; a second Ctrl-C kills."""

    def __init__(self) -> None:
        """Nothing is caught before `with`."""
        self.stop_reason = ""
        self._old_handlers: dict[int, Any] = {}

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():  # others cannot catch signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old_handlers[number] = signal.signal(number, self._on_signal)
        return self

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take SIGTERM back from Lightning, whose handler sends something to the other processes.

        They are in the middle of a step, where they expect something else: all would wait forever.
        """
        if self._old_handlers:
            signal.signal(signal.SIGTERM, self._on_signal)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def is_stop_requested(self) -> bool:
        """Tell whether this process is to stop."""
        return bool(self.stop_reason)

    def sync_stop_request(self, is_save_due: bool = False) -> tuple[bool, bool]:
        """Tell whether any process is to stop, and whether the first one finds that it is `late`.

        Every process has to ask at the same time.
        """
        if is_launcher_gone():
            self.stop_reason = self.stop_reason or "the end of its launcher"
        table = collectives.all_gather_numbers([bool(self.stop_reason), is_save_due])
        stop = bool(table[:, 0].any())
        if stop and collectives.is_distributed():
            self.stop_reason = next(filter(None, collectives.all_gather_objects(self.stop_reason)))
        return stop, bool(table[0, 1])

    def _on_signal(self, signum: int, _: Any) -> None:
        if self.stop_reason and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop_reason = "Ctrl-C" if signum == signal.SIGINT else "SIGTERM"


class CheckpointCallback(StageCallback):
    """Write checkpoints: every 60 s or 5 % of the steps, at the end, and when asked to stop.

    Those of large models take long: then the seconds between them become more.
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
    ) -> None:
        """Save `parts` of `vlm` during stage `stage_id` (number, name) into `run`.

        `clock` tells how many seconds the run has taken.
        """
        self.vlm = vlm
        self.run, self.stage_id, self.parts, self.elapsed_seconds = (
            run,
            stage_id,
            parts,
            elapsed_seconds,
        )
        self.interval_seconds, self.keep_last_checkpoints, self.graceful_stop = (
            interval_seconds,
            keep_last_checkpoints,
            graceful_stop,
        )
        self.saved_at, self.save_seconds = time.monotonic(), 0.0
        self.writer: checkpoint_files.CheckpointWriter | None = None
        self.losses_by_step: dict[int, float] = {}  # held-out loss by step, filled by HeldOut

    def on_step_end(self, training: VLMTrainingModule, step: OptimizerStep) -> None:
        """Save if it is time, and stop if somebody wants it, in all processes at the same step."""
        done = training.steps_done
        every = max(1, int(training.total_steps * MAX_REPEATED_SHARE))
        late = time.monotonic() - self.saved_at > max(
            self.interval_seconds, self.save_seconds / MAX_SAVING_SHARE
        )
        stop, late = self.graceful_stop.sync_stop_request(late)
        last = done == training.total_steps or stop
        if done % every == 0 or late or last:
            self.start_saving(training)
        if self.writer and (last or all(collectives.all_gather_objects(self.writer.is_written))):
            self.finish_saving()
        if stop:
            training.trainer.should_stop = True

    def start_saving(self, training: VLMTrainingModule) -> None:
        """Begin to write a checkpoint of this very step, after the one before is written."""
        began = time.monotonic()
        if self.writer:
            self.finish_saving()
        done = training.steps_done
        held_out = self.losses_by_step.get(done)
        position = RunPosition(
            *self.stage_id, done, held_out, training.seen, round(self.elapsed_seconds(), 1)
        )
        optimizer = training.trainer.optimizers[0]
        where, recipe = self.run.checkpoints_folder, self.run.recipe_file
        self.writer = checkpoint_files.CheckpointWriter(
            where, position, self.vlm, self.parts, optimizer, recipe
        )
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - began

    def finish_saving(self) -> None:
        """End the checkpoint that is being written, and remove old ones."""
        assert self.writer is not None
        self.writer.finish_writing()
        self.writer = None
        collectives.call_on_rank_zero(
            lambda: checkpoint_files.prune_checkpoints(
                self.run.checkpoints_folder, self.keep_last_checkpoints
            )
        )


class ValidationCallback(StageCallback):
    """Measure the loss on samples that training never meets, every `every` steps and at the end."""

    def __init__(
        self,
        batches: list[PackedBatch],
        every_n_steps: int,
        checkpoint_callback: CheckpointCallback,
    ) -> None:
        """Use `batches`, already encoded; results go to `saving`, which judges checkpoints."""
        self.batches, self.every_n_steps, self.checkpoint_callback = (
            batches,
            every_n_steps,
            checkpoint_callback,
        )
        self.latest_losses: dict[str, float] = {}

    def on_step_end(self, training: VLMTrainingModule, step: OptimizerStep) -> None:
        """Measure if it is time."""
        due = (
            training.steps_done % self.every_n_steps == 0
            or training.steps_done == training.total_steps
        )
        self.latest_losses = (
            held_out_losses(training.vlm, self.batches) if due and self.batches else {}
        )
        if self.latest_losses:
            self.checkpoint_callback.losses_by_step[training.steps_done] = self.latest_losses[
                "loss"
            ]


@torch.no_grad()
def held_out_losses(vlm: VLM, batches: list[PackedBatch]) -> dict[str, float]:
    """Return `loss` of `batches`, per supervised token, and each of the connector's own losses.

    In a stage with an objective of the connector's own, `loss` is the sum of those; pairs are
    compared with those of all `batches`.
    """
    torch.manual_seed(HELD_OUT_SEED)
    vlm.eval()
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for batch in add_contrast_pools(vlm, batches, all_processes=False):
        out = vlm(batch.to(vlm.device))
        found = dict(out.extra)
        if out.loss_sum is not None:
            found["loss"] = (out.loss_sum, torch.tensor(out.tokens))
        for name, (value, count) in found.items():
            sums[name] = sums.get(name, 0.0) + float(value)
            counts[name] = counts.get(name, 0) + int(count)
    vlm.train()
    means = {name: sums[name] / max(1, counts[name]) for name in sums}
    return {"loss": sum(means.values())} | means


class QuarantineCallback(StageCallback):
    """Count and name samples that cannot be used; stop when the data are simply wrong."""

    def __init__(self, run: RunFolder, on_bad_sample: str, data: SourceMixture) -> None:
        """`data` are those of the stage; `on_bad_sample` is auto, quarantine or stop."""
        self.run, self.on_bad_sample, self.sample_count = run, on_bad_sample, len(data)
        self.source_names = {source.name for source in data.sources} | {""}
        self.known_identities = set(_read_quarantine(run))
        self.skipped_samples = self.learned_samples = self.start_step = 0

    def on_stage_start(self, training: VLMTrainingModule) -> None:
        """Note where the stage goes on."""
        self.start_step = training.steps_done

    def on_step_end(self, training: VLMTrainingModule, step: OptimizerStep) -> None:
        """Note the bad samples of this step; raise when nothing was learned in a whole stage."""
        self.skipped_samples += step.skipped_samples
        self.learned_samples += training.report.samples
        try:
            self.record_bad_samples(step.bad_samples)
            if not training.report.samples and not step.skipped_samples:
                first = step.bad_samples[0]
                raise UserError(f"every sample of step {step.index} is bad, the first: {first}")
            if (
                training.steps_done == training.total_steps
                and not self.start_step
                and not self.learned_samples
            ):
                raise UserError(
                    f"nothing was learned in {training.total_steps} steps: "
                    f"{self.skipped_samples} samples have "
                    "no picture in a stage of captions, the others are bad"
                )
        except UserError as mistake:
            raise collectives.error_for_rank(
                mistake
            ) from mistake  # all processes have the same bad samples

    def record_bad_samples(self, bad_samples: list[BadSample]) -> None:
        """Write bad samples down, each once; raise when they are too many for `on_bad_sample`."""
        new = {
            one.record_identity: one
            for one in bad_samples
            if one.record_identity not in self.known_identities
        }
        self.known_identities |= set(new)
        if collectives.is_rank_zero():
            _append_quarantine(self.run, list(new.values()))
        count = sum(source in self.source_names for source, _ in self.known_identities)
        check_bad_samples(bad_samples, count, self.sample_count, self.on_bad_sample)


def check_bad_samples(
    bad_samples: list[BadSample], bad_count: int, sample_count: int, on_bad_sample: str
) -> None:
    """Raise a Mistake that names the first bad sample when there are too many.

    `stop` allows none, `auto` 1 in 100, `quarantine` any number while some are good.
    """
    limit = {"stop": 0, "auto": sample_count // 100, "quarantine": sample_count - 1}[on_bad_sample]
    if bad_samples and bad_count > limit:
        others = f" (and {bad_count - 1} more of {sample_count} samples)" if bad_count > 1 else ""
        raise UserError(
            f"{bad_samples[0]}{others}. Mend the data, or leave bad samples out with "
            "data.on_bad_sample=quarantine"
            if bad_count < sample_count
            else f"{bad_samples[0]}{others}. No good sample is left"
        )


def quarantine_samples(run: RunFolder, bad_samples: list[BadSample]) -> None:
    """Note samples that were found bad before training began."""
    known = set(_read_quarantine(run)) if bad_samples else set()
    _append_quarantine(run, [one for one in bad_samples if one.record_identity not in known])


def _append_quarantine(run: RunFolder, bad_samples: list[BadSample]) -> None:
    """Write bad samples down; `source` and `record` are their identity, `id` is a label."""
    lines = [
        {
            "id": one.sample_id,
            "reason": one.reason,
            "source": one.source_name,
            "record": one.record_number,
        }
        for one in bad_samples
    ]
    if lines:
        append_json_lines(run.quarantine_file, lines)


def _read_quarantine(run: RunFolder) -> list[tuple[str, int | str]]:
    """Return the identities of the samples that are noted."""
    return [
        BadSample(one["id"], one["reason"])
        .with_origin(one.get("source", ""), one.get("record"))
        .record_identity
        for one in read_json_lines(run.quarantine_file)
    ]


class NonFiniteGuard(StageCallback):
    """Name the samples of steps whose loss or gradient was not finite; give up after several."""

    def __init__(
        self, stage_name: str, max_nonfinite_steps: int, print_line: Callable[[str], None]
    ) -> None:
        """Stop `stage` after `limit` such steps in a row; `say` prints a line."""
        self.stage_name, self.max_nonfinite_steps, self.print_line = (
            stage_name,
            max_nonfinite_steps,
            print_line,
        )
        self.nonfinite_streak: list[str] = []
        """What was not finite in the last steps, up to the newest."""

    def on_step_end(self, training: VLMTrainingModule, step: OptimizerStep) -> None:
        """Look at the step that has just been taken."""
        report = training.report
        if not report.skipped:
            self.nonfinite_streak = []
            return
        what = "gradient" if math.isfinite(report.loss) else "loss"  # which the gradient follows
        self.nonfinite_streak.append(what)
        mine = [name for part in step.micro_batches for name in part.sample_ids]
        names = [name for theirs in collectives.all_gather_objects(mine) for name in theirs]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        self.print_line(
            f"stage {self.stage_name}, step {training.steps_done}: {what} is not finite, step "
            "skipped; "
            f"samples: {shown}; loss {report.loss:.4g}, norm of the gradient {report.grad_norm:.4g}"
        )
        last = training.steps_done == training.total_steps
        if len(self.nonfinite_streak) >= self.max_nonfinite_steps or (
            last and len(self.nonfinite_streak) >= training.total_steps
        ):
            raise collectives.error_for_rank(UserError(self._give_up_message(training)))

    def _give_up_message(self, training: VLMTrainingModule) -> str:
        what = " or ".join(f"the {one}" for one in sorted(set(self.nonfinite_streak), reverse=True))
        rates = ", ".join(
            f"{part} {how.lr:g}" for part, how in training.stage.trained_parts.items()
        )
        half = "" if str(training.trainer.precision).startswith("32") else ", or set precision=32"
        return (
            f"stage {self.stage_name}: {what} was not finite in {len(self.nonfinite_streak)} "
            "steps in a row, up to "
            f"step {training.steps_done}: lower the learning rates (now {rates}: "
            f"stages.{self.stage_name}.train.PART.lr){half}"
        )
