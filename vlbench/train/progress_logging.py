"""What is shown and written down while a stage trains: the progress bar, metrics.csv, loggers."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from vlbench.connector.base import Connector
from vlbench.data.optimizer_step import OptimizerStep
from vlbench.errors import UserError
from vlbench.model.fsdp_wrapping import unsharded_connector
from vlbench.regular_files import MAX_RECORDS_BYTES
from vlbench.text_files import append_text, read_text, write_atomically
from vlbench.train.callbacks import StageCallback, ValidationCallback
from vlbench.train.step_report import StepReport
from vlbench.train.throughput import ThroughputMeter, format_throughput
from vlbench.train.training_module import VLMTrainingModule

METRIC_COLUMNS = (
    "stage",
    "step",
    "loss",
    "held_out_loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "images_per_second",
    "views_per_second",
    "step_seconds",
    "data_wait",
    "mfu",
    "memory",
    "seconds",
)


def truncate_metrics(path: Path, stage_names: list[str], stage_name: str, step: int) -> None:
    """Drop the rows of `path` after step `step` of a stage: a resumed run writes them again.

    `stage_names` gives the order of the stages.
    """
    if not path.is_file():
        return
    columns, rows = _read_metric_rows(path)
    last_kept = (stage_names.index(stage_name), step)
    # a kill may have cut the last row short
    complete = [row for row in rows if row.get("seconds") and row.get("stage") in stage_names]
    try:
        kept = [
            row
            for row in complete
            if (stage_names.index(row["stage"]), int(row["step"])) <= last_kept
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: has a row without the number of its step") from error
    _write_metric_rows(path, columns, kept)


def _read_metric_rows(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the columns and rows of a table."""
    reader = csv.DictReader(io.StringIO(read_text(path, MAX_RECORDS_BYTES)))
    return list(reader.fieldnames or METRIC_COLUMNS), list(reader)


def _write_metric_rows(path: Path, columns: Sequence[str], rows: list[dict[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def connector_metrics(connector: Connector, taken_names: Container[str]) -> dict[str, float]:
    """Return the metrics of a connector; a UserError for a name that another column has."""
    metrics = {name: float(value) for name, value in connector.metrics().items()}
    for name in metrics:
        if name in taken_names:
            raise UserError(
                f"connector {type(connector).__name__}: a gauge is called '{name}', and so is "
                "another column of metrics.csv; give the gauge another name"
            )
    return metrics


def can_show_bar(bar_class: type) -> bool:
    """Tell whether a bar can be redrawn: on a terminal, or as a widget of a notebook.

    Elsewhere, in a notebook without ipywidgets too, there are lines.
    """
    if sys.stderr.isatty():
        return True
    notebook = sys.modules.get("tqdm.notebook")  # `tqdm.auto` imports it in notebooks alone
    return notebook is not None and issubclass(bar_class, notebook.tqdm_notebook)


class ProgressCallback(StageCallback):
    """Show loss, speed and time left, and write metrics, every `every_n_steps` steps."""

    def __init__(
        self,
        stage_name: str,
        step_offset: int,
        every_n_steps: int,
        metrics_file: Path | None,
        validation: ValidationCallback,
    ) -> None:
        """Report one stage.

        Args:
            stage_name: Shown and written in every row.
            step_offset: Optimizer steps of earlier stages; loggers count through all stages.
            every_n_steps: Steps between two rows; an evaluation and the last step have one, too.
            metrics_file: metrics.csv of the run; None where another process writes it.
            validation: Has the held-out losses of the newest step; it must be called before.
        """
        self.stage_name, self.step_offset = stage_name, step_offset
        self.every_n_steps = every_n_steps
        self.metrics_file, self.validation = metrics_file, validation
        self.throughput = ThroughputMeter()

    def on_stage_start(self, training: VLMTrainingModule) -> None:
        """Start the clock and the progress bar."""
        self.throughput.start_measuring(training)
        self.start_step = training.steps_done
        self.is_interactive = can_show_bar(tqdm)
        self.progress_bar = tqdm(
            total=training.total_steps,
            initial=training.steps_done,
            desc=self.stage_name,
            unit="step",
            dynamic_ncols=True,
            disable=not self.is_interactive,
        )

    def on_step_end(self, training: VLMTrainingModule, step: OptimizerStep) -> None:
        """Count a step, and write a row of metrics if it is time."""
        report = training.report
        self.throughput.count_step(training, step)
        self.progress_bar.update()
        is_last = training.steps_done == training.total_steps
        is_due = training.steps_done % self.every_n_steps == 0
        if is_due or is_last or self.validation.latest_losses:
            self._log_metrics(training, report)

    def _log_metrics(self, training: VLMTrainingModule, report: StepReport) -> None:
        held_out_losses = self.validation.latest_losses
        row: dict[str, Any] = {
            "stage": self.stage_name,
            "step": training.steps_done,
            "loss": report.loss,
            "held_out_loss": held_out_losses.get("loss", ""),
            "lr": report.lr,
            "grad_norm": report.grad_norm,
            **self.throughput.read_and_reset(),
        }
        row |= report.extra  # the connector's own losses, a column each
        row |= {f"held_out_{name}": held_out_losses.get(name, "") for name in report.extra}
        with unsharded_connector(training.vlm):
            row |= connector_metrics(training.vlm.connector, row)
        self._append_metrics(row)
        numbers = {name: value for name, value in row.items() if isinstance(value, float)}
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
        new_columns = [name for name in row if name not in columns]
        if new_columns or not rows:
            _write_metric_rows(self.metrics_file, [*columns, *new_columns], [*rows, row])
            return
        with append_text(self.metrics_file) as file:
            csv.DictWriter(file, columns).writerow(row)

    def _show_progress(self, training: VLMTrainingModule, row: dict[str, Any]) -> None:
        speed = format_throughput(row)
        held_out = row["held_out_loss"]
        losses = f"loss {row['loss']:.3f}"
        losses += f" (held out {held_out:.3f})" if held_out != "" else ""
        losses += "".join(f", {name} {row[name]:.3f}" for name in training.report.extra)
        self.progress_bar.set_postfix_str(f"{losses}, {speed}")
        if not self.is_interactive:
            steps_taken = max(1, training.steps_done - self.start_step)
            steps_left = training.total_steps - training.steps_done
            print(
                f"{self.stage_name} {training.steps_done}/{training.total_steps}: {losses}, "
                f"{speed}, {steps_left * row['seconds'] / steps_taken:.0f} s left",
                flush=True,
            )

    def on_stage_end(self, training: VLMTrainingModule) -> None:
        """Close the progress bar."""
        self.progress_bar.close()
