"""What metrics.csv says of training, over the seeds of a row, stage by stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlbench.compare.findings import Row
from vlbench.compare.runs import Finished
from vlbench.files import read_table
from vlbench.mistakes import Mistake

Table = list[dict[str, str]]
"""The rows of a metrics.csv."""


@dataclass(frozen=True)
class Series:
    """A column of metrics.csv within one stage, at the steps at which every seed has it."""

    steps: list[int]
    mean: list[float]
    low: list[float]
    """The smallest value of a seed."""
    high: list[float]


def tables(row: Row) -> list[Table]:
    """Return the metrics of those runs of a row that have any."""
    found = [table(run) for run in row.runs]
    return [one for one in found if one]


def table(run: Finished) -> Table:
    """Return the metrics of a run, [] if there are none; a line that a kill tore is left out."""
    file = run.folder / "metrics.csv"
    lines = read_table(file)
    if lines and not {"stage", "step", "seconds"} <= set(lines[0]):
        raise Mistake(f"{file}: has no columns stage, step and seconds")
    return [line for line in lines if line["seconds"]]


def stages(found: Sequence[Table]) -> list[str]:
    """Return the names of all stages, in the order of training."""
    return list(dict.fromkeys(line["stage"] for one in found for line in one))


def columns(found: Sequence[Table], prefix: str) -> list[str]:
    """Return the columns that begin with `prefix` and have values, in the order of the files."""
    named = (key for one in found for line in one for key, value in line.items() if key and value)
    return [key for key in dict.fromkeys(named) if key.startswith(prefix)]


def series(found: Sequence[Table], column: str) -> dict[str, Series]:
    """Return the values of a column over the seeds: stage -> series; stages without it are out."""
    by_stage = {
        stage: _series([_points(one, stage, column) for one in found]) for stage in stages(found)
    }
    return {stage: one for stage, one in by_stage.items() if one.steps}


def _points(one: Table, stage: str, column: str) -> dict[int, float]:
    """Return step -> value of a column in a stage; what is empty or not finite is left out."""
    try:
        values = {
            int(line["step"]): float(line[column])
            for line in one
            if line["stage"] == stage and line.get(column)
        }
    except ValueError as error:
        raise Mistake(f"metrics.csv: column {column} holds what is no number ({error})") from error
    return {step: value for step, value in values.items() if math.isfinite(value)}


def _series(points: Sequence[dict[int, float]]) -> Series:
    steps = sorted(set.intersection(*(set(one) for one in points))) if points else []
    values = [[one[step] for one in points] for step in steps]
    return Series(
        steps,
        [sum(one) / len(one) for one in values],
        [min(one) for one in values],
        [max(one) for one in values],
    )
