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

from vlbench import ranks
from vlbench.data.batch import Batch
from vlbench.data.order import Mixture
from vlbench.data.steps import Step
from vlbench.files import append_json_lines, read_json_lines
from vlbench.mistakes import BadSample, Mistake
from vlbench.model.contrast import pooled
from vlbench.model.vlm import VLM
from vlbench.train import checkpoint
from vlbench.train.checkpoint import Position
from vlbench.train.launch import launcher_is_gone
from vlbench.train.module import Training, Watcher
from vlbench.train.run import Run

REPEATED = 0.05  # share of a stage's steps that may be repeated after a kill
SPENT = 0.05  # share of the time that saving every so many seconds may take
HELD_OUT_SEED = 0  # of what is random in a connector's own loss: the same at every measurement


class Interrupts(pl.Callback):
    """Turn Ctrl-C and SIGTERM into a wish to stop after the running step; a second Ctrl-C kills."""

    def __init__(self) -> None:
        """Nothing is caught before `with`."""
        self.wanted = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # others cannot catch signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take SIGTERM back from Lightning, whose handler sends something to the other processes.

        They are in the middle of a step, where they expect something else: all would wait forever.
        """
        if self._before:
            signal.signal(signal.SIGTERM, self._note)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def asked(self) -> bool:
        """Tell whether this process is to stop."""
        return bool(self.wanted)

    def agreed(self, late: bool = False) -> tuple[bool, bool]:
        """Tell whether any process is to stop, and whether the first one finds that it is `late`.

        Every process has to ask at the same time.
        """
        if launcher_is_gone():
            self.wanted = self.wanted or "the end of its launcher"
        table = ranks.table([bool(self.wanted), late])
        stop = bool(table[:, 0].any())
        if stop and ranks.several():
            self.wanted = next(filter(None, ranks.everyone(self.wanted)))
        return stop, bool(table[0, 1])

    def _note(self, number: int, _: Any) -> None:
        if self.wanted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.wanted = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"


class Saving(Watcher):
    """Write checkpoints: every 60 s or 5 % of the steps, at the end, and when asked to stop.

    Those of large models take long: then the seconds between them become more.
    """

    def __init__(
        self,
        run: Run,
        stage: tuple[int, str],
        parts: list[str],
        seconds: float,
        keep_last: int,
        interrupts: Interrupts,
        clock: Callable[[], float],
    ) -> None:
        """Save `parts` of the model of `stage` (number, name) into `run`.

        `clock` tells how many seconds the run has taken.
        """
        self.run, self.stage, self.parts, self.clock = run, stage, parts, clock
        self.seconds, self.keep_last, self.interrupts = seconds, keep_last, interrupts
        self.saved_at, self.took = time.monotonic(), 0.0
        self.writing: checkpoint.Writing | None = None
        self.held_out: dict[int, float] = {}  # held-out loss by step, filled by HeldOut

    def after(self, training: Training, step: Step) -> None:
        """Save if it is time, and stop if somebody wants it, in all processes at the same step."""
        done = training.position
        every = max(1, int(training.steps * REPEATED))
        late = time.monotonic() - self.saved_at > max(self.seconds, self.took / SPENT)
        stop, late = self.interrupts.agreed(late)
        last = done == training.steps or stop
        if done % every == 0 or late or last:
            self.save(training)
        if self.writing and (last or all(ranks.everyone(self.writing.done))):
            self.finish()
        if stop:
            training.trainer.should_stop = True

    def save(self, training: Training) -> None:
        """Begin to write a checkpoint of this very step, after the one before is written."""
        began = time.monotonic()
        if self.writing:
            self.finish()
        done = training.position
        held_out = self.held_out.get(done)
        position = Position(*self.stage, done, held_out, training.seen, round(self.clock(), 1))
        optimizer = training.trainer.optimizers[0]
        where, recipe = self.run.checkpoints, self.run.recipe_file
        vlm, parts = training.vlm, self.parts
        self.writing = checkpoint.Writing(where, position, vlm, parts, optimizer, recipe)
        self.saved_at = time.monotonic()
        self.took = self.saved_at - began

    def finish(self) -> None:
        """End the checkpoint that is being written, and remove old ones."""
        assert self.writing is not None
        self.writing.end()
        self.writing = None
        ranks.first(lambda: checkpoint.prune(self.run.checkpoints, self.keep_last))


class HeldOut(Watcher):
    """Measure the loss on samples that training never meets, every `every` steps and at the end."""

    def __init__(self, batches: list[Batch], every: int, saving: Saving) -> None:
        """Use `batches`, already encoded; results go to `saving`, which judges checkpoints."""
        self.batches, self.every, self.saving = batches, every, saving
        self.latest: dict[str, float] = {}

    def after(self, training: Training, step: Step) -> None:
        """Measure if it is time."""
        due = training.position % self.every == 0 or training.position == training.steps
        self.latest = held_out_losses(training.vlm, self.batches) if due and self.batches else {}
        if self.latest:
            self.saving.held_out[training.position] = self.latest["loss"]


@torch.no_grad()
def held_out_losses(vlm: VLM, batches: list[Batch]) -> dict[str, float]:
    """Return `loss` of `batches`, per supervised token, and each of the connector's own losses.

    In a stage with an objective of the connector's own, `loss` is the sum of those; pairs are
    compared with those of all `batches`.
    """
    torch.manual_seed(HELD_OUT_SEED)
    vlm.eval()
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for batch in pooled(vlm, batches, shared=False):
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


class Quarantine(Watcher):
    """Count and name samples that cannot be used; stop when the data are simply wrong."""

    def __init__(self, run: Run, on_bad: str, data: Mixture) -> None:
        """`data` are those of the stage; `on_bad` is auto, quarantine or stop."""
        self.run, self.on_bad, self.samples = run, on_bad, len(data)
        self.names = {source.name for source in data.sources} | {""}
        self.known = set(_read(run))
        self.skipped = self.learned = self.begun = 0

    def begin(self, training: Training) -> None:
        """Note where the stage goes on."""
        self.begun = training.position

    def after(self, training: Training, step: Step) -> None:
        """Note the bad samples of this step; raise when nothing was learned in a whole stage."""
        self.skipped += step.skipped
        self.learned += training.report.samples
        try:
            self.note(step.bad)
            if not training.report.samples and not step.skipped:
                first = step.bad[0]
                raise Mistake(f"every sample of step {step.index} is bad, the first: {first}")
            if training.position == training.steps and not self.begun and not self.learned:
                raise Mistake(
                    f"nothing was learned in {training.steps} steps: {self.skipped} samples have "
                    "no picture in a stage of captions, the others are bad"
                )
        except Mistake as mistake:
            raise ranks.known(mistake) from mistake  # all processes have the same bad samples

    def note(self, bad: list[BadSample]) -> None:
        """Write bad samples down, each once; raise when they are too many for `on_bad`."""
        new = {one.identity: one for one in bad if one.identity not in self.known}
        self.known |= set(new)
        if ranks.is_first():
            _append(self.run, list(new.values()))
        count = sum(source in self.names for source, _ in self.known)
        judge(bad, count, self.samples, self.on_bad)


def judge(bad: list[BadSample], count: int, samples: int, on_bad: str) -> None:
    """Raise a Mistake that names the first bad sample when there are too many.

    `stop` allows none, `auto` 1 in 100, `quarantine` any number while some are good.
    """
    limit = {"stop": 0, "auto": samples // 100, "quarantine": samples - 1}[on_bad]
    if bad and count > limit:
        others = f" (and {count - 1} more of {samples} samples)" if count > 1 else ""
        raise Mistake(
            f"{bad[0]}{others}. Mend the data, or leave bad samples out with data.on_bad=quarantine"
            if count < samples
            else f"{bad[0]}{others}. No good sample is left"
        )


def set_aside(run: Run, bad: list[BadSample]) -> None:
    """Note samples that were found bad before training began."""
    known = set(_read(run)) if bad else set()
    _append(run, [one for one in bad if one.identity not in known])


def _append(run: Run, bad: list[BadSample]) -> None:
    """Write bad samples down; `source` and `record` are their identity, `id` is a label."""
    lines = [
        {"id": one.sample_id, "reason": one.reason, "source": one.source, "record": one.record}
        for one in bad
    ]
    if lines:
        append_json_lines(run.quarantine_file, lines)


def _read(run: Run) -> list[tuple[str, int | str]]:
    """Return the identities of the samples that are noted."""
    return [
        BadSample(one["id"], one["reason"]).at(one.get("source", ""), one.get("record")).identity
        for one in read_json_lines(run.quarantine_file)
    ]


class NotFinite(Watcher):
    """Name the samples of steps whose loss or gradient was not finite; give up after several."""

    def __init__(self, stage: str, limit: int, say: Callable[[str], None]) -> None:
        """Stop `stage` after `limit` such steps in a row; `say` prints a line."""
        self.stage, self.limit, self.say = stage, limit, say
        self.row: list[str] = []
        """What was not finite in the last steps, up to the newest."""

    def after(self, training: Training, step: Step) -> None:
        """Look at the step that has just been taken."""
        report = training.report
        if not report.skipped:
            self.row = []
            return
        what = "gradient" if math.isfinite(report.loss) else "loss"  # which the gradient follows
        self.row.append(what)
        mine = [name for part in step.batches for name in part.sample_id]
        names = [name for theirs in ranks.everyone(mine) for name in theirs]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        self.say(
            f"stage {self.stage}, step {training.position}: {what} is not finite, step skipped; "
            f"samples: {shown}; loss {report.loss:.4g}, norm of the gradient {report.grad_norm:.4g}"
        )
        last = training.position == training.steps
        if len(self.row) >= self.limit or (last and len(self.row) >= training.steps):
            raise ranks.known(Mistake(self._given_up(training)))

    def _given_up(self, training: Training) -> str:
        what = " or ".join(f"the {one}" for one in sorted(set(self.row), reverse=True))
        rates = ", ".join(f"{part} {how.lr:g}" for part, how in training.stage.parts.items())
        half = "" if str(training.trainer.precision).startswith("32") else ", or set precision=32"
        return (
            f"stage {self.stage}: {what} was not finite in {len(self.row)} steps in a row, up to "
            f"step {training.position}: lower the learning rates (now {rates}: "
            f"stages.{self.stage}.train.PART.lr){half}"
        )
