"""What is shown and written down while a stage trains: the progress bar, metrics.csv, loggers."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlbench.connector import Connector
from vlbench.data.steps import Step
from vlbench.files import write_whole
from vlbench.mistakes import Mistake
from vlbench.model.shard import gathered
from vlbench.train.module import StepReport, Training, Watcher
from vlbench.train.speed import Speed, rates
from vlbench.train.watchers import HeldOut

COLUMNS = (
    "stage",
    "step",
    "loss",
    "held_out_loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "images_per_second",
    "step_seconds",
    "data_wait",
    "mfu",
    "memory",
    "seconds",
)


def cut(path: Path, stages: list[str], stage: str, step: int) -> None:
    """Drop the rows of `path` that lie beyond `step` of `stage`: a resumed run writes them anew.

    `stages` gives the order of the stages.
    """
    if not path.is_file():
        return
    columns, rows = _rows(path)
    here = stages.index(stage)
    whole = [row for row in rows if row["seconds"] and row["stage"] in stages]  # a kill tears one
    kept = [r for r in whole if (stages.index(r["stage"]), int(r["step"])) <= (here, step)]
    _write_rows(path, columns, kept)


def _rows(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the columns and rows of a table."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        return list(reader.fieldnames or COLUMNS), list(reader)


def _write_rows(path: Path, columns: Sequence[str], rows: list[dict[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def gauges_of(connector: Connector, taken: Container[str]) -> dict[str, float]:
    """Return the connector's gauges; a Mistake for a name that another column has."""
    gauges = {name: float(value) for name, value in connector.gauges().items()}
    for name in gauges:
        if name in taken:
            raise Mistake(
                f"connector {type(connector).__name__}: a gauge is called '{name}', and so is "
                "another column of metrics.csv; give the gauge another name"
            )
    return gauges


class Progress(Watcher):
    """Show loss, speed and time left, and write metrics, every `every` steps."""

    def __init__(
        self, stage: str, offset: int, every: int, metrics: Path | None, held_out: HeldOut
    ) -> None:
        """`offset` is the number of steps of earlier stages, for loggers that know one axis."""
        self.stage, self.offset, self.every = stage, offset, every
        self.metrics, self.held_out = metrics, held_out
        self.speed = Speed()

    def begin(self, training: Training) -> None:
        """Open the bar."""
        self.speed.begin(training)
        self.start = training.position
        self.interactive = sys.stderr.isatty()
        self.bar = tqdm(
            total=training.steps,
            initial=training.position,
            desc=self.stage,
            unit="step",
            dynamic_ncols=True,
            disable=not self.interactive,
        )

    def after(self, training: Training, step: Step) -> None:
        """Count a step; every so often say and write how it goes."""
        report = training.report
        self.speed.after(training, step)
        self.bar.update()
        last = training.position == training.steps
        if training.position % self.every == 0 or last or self.held_out.latest:
            self._tell(training, report)

    def _tell(self, training: Training, report: StepReport) -> None:
        held_out = self.held_out.latest
        row: dict[str, Any] = {
            "stage": self.stage,
            "step": training.position,
            "loss": report.loss,
            "held_out_loss": held_out.get("loss", ""),
            "lr": report.lr,
            "grad_norm": report.grad_norm,
            **self.speed.told(),
        }
        row |= report.extra  # the connector's own losses, a column each
        row |= {f"held_out_{k}": held_out.get(k, "") for k in report.extra}
        with gathered(training.vlm):
            row |= gauges_of(training.vlm.connector, row)
        self._write(row)
        numbers = {k: v for k, v in row.items() if isinstance(v, float)}
        for logger in training.trainer.loggers:
            logger.log_metrics(numbers, step=self.offset + training.position)
        self._show(training, row)

    def _write(self, row: dict[str, Any]) -> None:
        if self.metrics is None:
            return
        columns, rows = _rows(self.metrics) if self.metrics.exists() else (list(COLUMNS), [])
        more = [name for name in row if name not in columns]
        if more or not rows:
            _write_rows(self.metrics, [*columns, *more], [*rows, row])
            return
        with self.metrics.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, columns).writerow(row)

    def _show(self, training: Training, row: dict[str, Any]) -> None:
        speed = rates(row)
        held = row["held_out_loss"]
        losses = f"loss {row['loss']:.3f}" + (f" (held out {held:.3f})" if held != "" else "")
        own = [name for name in training.report.extra if name in row]
        losses += "".join(f", {name} {row[name]:.3f}" for name in own)
        self.bar.set_postfix_str(f"{losses}, {speed}")
        if not self.interactive:
            done = training.position - self.start
            left = (training.steps - training.position) * row["seconds"] / max(1, done)
            print(
                f"{self.stage} {training.position}/{training.steps}: {losses}, {speed}, "
                f"{left:.0f} s left",
                flush=True,
            )

    def end(self, training: Training) -> None:
        """Close the bar."""
        self.bar.close()
