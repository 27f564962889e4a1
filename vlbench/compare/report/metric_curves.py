"""What metrics.csv says of training, over the seeds of a row, stage by stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlbench.compare.report.analysis import RowResult
from vlbench.compare.report.finished_runs import FinishedRun
from vlbench.errors import UserError
from vlbench.text_files import read_csv

MetricsTable = list[dict[str, str]]
"""The rows of a metrics.csv."""


@dataclass(frozen=True)
class MetricSeries:
    """A column of metrics.csv within one stage, at the steps at which every seed has it."""

    steps: list[int]
    mean: list[float]
    low: list[float]
    """The smallest value of a seed."""
    high: list[float]


def load_row_metrics(row: RowResult) -> list[MetricsTable]:
    """Return the metrics of those runs of a row that have any."""
    found = [load_run_metrics(run) for run in row.runs]
    return [one for one in found if one]


def load_run_metrics(run: FinishedRun) -> MetricsTable:
    """Return the metrics of a run, [] if there are none; a line that a kill tore is left out."""
    file = run.folder / "metrics.csv"
    lines = read_csv(file)
    if lines and not {"stage", "step", "seconds"} <= set(lines[0]):
        raise UserError(f"{file}: has no columns stage, step and seconds")
    return [line for line in lines if line["seconds"]]


def stage_names(tables: Sequence[MetricsTable]) -> list[str]:
    """Return the names of all stages, in the order of training."""
    return list(dict.fromkeys(line["stage"] for one in tables for line in one))


def metric_columns(tables: Sequence[MetricsTable], prefix: str) -> list[str]:
    """Return the columns that begin with `prefix` and have values, in the order of the files."""
    named = (key for one in tables for line in one for key, value in line.items() if key and value)
    return [key for key in dict.fromkeys(named) if key.startswith(prefix)]


def series_by_stage(tables: Sequence[MetricsTable], column: str) -> dict[str, MetricSeries]:
    """Return the values of a column over the seeds: stage -> series; stages without it are out."""
    by_stage = {
        stage: _aggregate_seeds([_step_values(one, stage, column) for one in tables])
        for stage in stage_names(tables)
    }
    return {stage: one for stage, one in by_stage.items() if one.steps}


def _step_values(table: MetricsTable, stage: str, column: str) -> dict[int, float]:
    """Return step -> value of a column in a stage; what is empty or not finite is left out."""
    try:
        values = {
            int(line["step"]): float(line[column])
            for line in table
            if line["stage"] == stage and line.get(column)
        }
    except ValueError as error:
        raise UserError(
            f"metrics.csv: column {column} holds what is no number ({error})"
        ) from error
    return {step: value for step, value in values.items() if math.isfinite(value)}


def _aggregate_seeds(seed_values: Sequence[dict[int, float]]) -> MetricSeries:
    steps = sorted(set.intersection(*(set(one) for one in seed_values))) if seed_values else []
    values = [[one[step] for one in seed_values] for step in steps]
    return MetricSeries(
        steps,
        [sum(one) / len(one) for one in values],
        [min(one) for one in values],
        [max(one) for one in values],
    )
