"""What is shown and written down while a stage trains: the progress bar, metrics.csv, loggers."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlbench.connector.base import Connector
from vlbench.data.batch_sampler import OptimizerStep
from vlbench.errors import UserError
from vlbench.model.fsdp_wrapping import unsharded_connector
from vlbench.text_files import write_atomically
from vlbench.train.callbacks import StageCallback, ValidationCallback
from vlbench.train.throughput import ThroughputMeter, format_throughput
from vlbench.train.training_module import StepReport, VLMTrainingModule

METRIC_COLUMNS = (
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


def truncate_metrics(path: Path, stage_names: list[str], stage_name: str, step: int) -> None:
    """Drop the rows of `path` that lie beyond `step` of `stage`: a resumed run writes them anew.

    `stages` gives the order of the stages.
    """
    if not path.is_file():
        return
    columns, rows = _read_metric_rows(path)
    here = stage_names.index(stage_name)
    whole = [
        row for row in rows if row["seconds"] and row["stage"] in stage_names
    ]  # a kill tears one
    kept = [r for r in whole if (stage_names.index(r["stage"]), int(r["step"])) <= (here, step)]
    _write_metric_rows(path, columns, kept)


def _read_metric_rows(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the columns and rows of a table."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        return list(reader.fieldnames or METRIC_COLUMNS), list(reader)


def _write_metric_rows(path: Path, columns: Sequence[str], rows: list[dict[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def connector_metrics(connector: Connector, taken_names: Container[str]) -> dict[str, float]:
    """Return the connector's gauges; a Mistake for a name that another column has."""
    gauges = {name: float(value) for name, value in connector.metrics().items()}
    for name in gauges:
        if name in taken_names:
            raise UserError(
                f"connector {type(connector).__name__}: a gauge is called '{name}', and so is "
                "another column of metrics.csv; give the gauge another name"
            )
    return gauges


class ProgressCallback(StageCallback):
    """Show loss, speed and time left, and write metrics, every `every` steps."""

    def __init__(
        self,
        stage_name: str,
        step_offset: int,
        every_n_steps: int,
        metrics_file: Path | None,
        validation: ValidationCallback,
    ) -> None:
        """`offset` is the number of steps of earlier stages, for loggers that know one axis."""
        self.stage_name, self.step_offset, self.every_n_steps = (
            stage_name,
            step_offset,
            every_n_steps,
        )
        self.metrics_file, self.validation = metrics_file, validation
        self.throughput = ThroughputMeter()

    def on_stage_start(self, training: VLMTrainingModule) -> None:
        """Open the bar."""
        self.throughput.start_measuring(training)
        self.start_step = training.steps_done
        self.is_interactive = sys.stderr.isatty()
        self.progress_bar = tqdm(
            total=training.total_steps,
            initial=training.steps_done,
            desc=self.stage_name,
            unit="step",
            dynamic_ncols=True,
            disable=not self.is_interactive,
        )

    def on_step_end(self, training: VLMTrainingModule, step: OptimizerStep) -> None:
        """Count a step; every so often say and write how it goes."""
        report = training.report
        self.throughput.count_step(training, step)
        self.progress_bar.update()
        last = training.steps_done == training.total_steps
        if training.steps_done % self.every_n_steps == 0 or last or self.validation.latest_losses:
            self._log_metrics(training, report)

    def _log_metrics(self, training: VLMTrainingModule, report: StepReport) -> None:
        held_out = self.validation.latest_losses
        row: dict[str, Any] = {
            "stage": self.stage_name,
            "step": training.steps_done,
            "loss": report.loss,
            "held_out_loss": held_out.get("loss", ""),
            "lr": report.lr,
            "grad_norm": report.grad_norm,
            **self.throughput.read_and_reset(),
        }
        row |= report.extra  # the connector's own losses, a column each
        row |= {f"held_out_{k}": held_out.get(k, "") for k in report.extra}
        with unsharded_connector(training.vlm):
            row |= connector_metrics(training.vlm.connector, row)
        self._append_metrics(row)
        numbers = {k: v for k, v in row.items() if isinstance(v, float)}
        for logger in training.trainer.loggers:
            logger.log_metrics(numbers, step=self.step_offset + training.steps_done)
        self._show_progress(training, row)

    def _append_metrics(self, row: dict[str, Any]) -> None:
        if self.metrics_file is None:
            return
        columns, rows = (
            _read_metric_rows(self.metrics_file)
            if self.metrics_file.exists()
            else (list(METRIC_COLUMNS), [])
        )
        more = [name for name in row if name not in columns]
        if more or not rows:
            _write_metric_rows(self.metrics_file, [*columns, *more], [*rows, row])
            return
        with self.metrics_file.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, columns).writerow(row)

    def _show_progress(self, training: VLMTrainingModule, row: dict[str, Any]) -> None:
        speed = format_throughput(row)
        held = row["held_out_loss"]
        losses = f"loss {row['loss']:.3f}" + (f" (held out {held:.3f})" if held != "" else "")
        own = [name for name in training.report.extra if name in row]
        losses += "".join(f", {name} {row[name]:.3f}" for name in own)
        self.progress_bar.set_postfix_str(f"{losses}, {speed}")
        if not self.is_interactive:
            done = training.steps_done - self.start_step
            left = (training.total_steps - training.steps_done) * row["seconds"] / max(1, done)
            print(
                f"{self.stage_name} {training.steps_done}/{training.total_steps}: {losses}, "
                f"{speed}, "
                f"{left:.0f} s left",
                flush=True,
            )

    def on_stage_end(self, training: VLMTrainingModule) -> None:
        """Close the bar."""
        self.progress_bar.close()
