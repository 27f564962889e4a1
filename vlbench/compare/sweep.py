"""`sweep=0.3,1,3`: every row tries its connector's learning rate times these factors first.

One rate shared by all connectors decides between them before they have learned anything: a Q-Former
needs another one than an MLP. So that nobody gets more tries than others, all rows try the same
factors for the same number of steps, with a seed that the comparison does not use. The factor with
the lowest held-out language loss is taken; the questions have no part in the choice.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

from vlbench.compare import grid as grids
from vlbench.compare.grid import Grid, Row
from vlbench.compare.jobs import Job
from vlbench.files import read_json, read_table, write_whole
from vlbench.train.run import Run

CHOICE = "sweep.json"
FOLDER = "sweep"


def trials(grid: Grid) -> list[Job]:
    """Return the runs that try learning rates, rows taking turns; [] without a sweep."""
    return [
        Job(
            f"{row.name}, rate x {factor:g}",
            (*words(grid, row, factor), f"seed={seed(grid)}", f"run={folder(grid, row, factor)}"),
            folder(grid, row, factor),
        )
        for factor in grid.sweep
        for row in grid.rows
    ]


def seed(grid: Grid) -> int:
    """Return a seed that no run of the comparison has."""
    return max(grid.seeds) + 1


def folder(grid: Grid, row: Row, factor: float) -> Path:
    """Return where a rate is tried."""
    return grid.folder / FOLDER / row.name / f"x{factor:g}"


def words(grid: Grid, row: Row, factor: float) -> tuple[str, ...]:
    """Return the words of `fit` for a trial: few questions are asked, as none is looked at."""
    return with_rate(grid, row, factor).changed({"log.questions": 1, "log.examples": 0}).words


def with_rate(grid: Grid, row: Row, factor: float) -> Row:
    """Return the row with its connector's learning rate multiplied in every stage."""
    rates = {
        f"stages.{name}.train.connector.lr": stage.parts["connector"].lr * factor
        for name, stage in grids.load(row, seed(grid)).stages.items()
        if "connector" in stage.parts
    }
    return row.changed({key: f"{rate:.6g}" for key, rate in rates.items()})


def chosen(grid: Grid) -> Grid:
    """Return the grid with the best rate in every row, and write down how it was found.

    A row none of whose trials ended keeps the rates that it had.
    """
    found = {
        row.name: {factor: held_out(folder(grid, row, factor)) for factor in grid.sweep}
        for row in grid.rows
    }
    best = {name: _lowest(losses) for name, losses in found.items()}
    rows = tuple(
        row if (factor := best[row.name]) is None else with_rate(grid, row, factor)
        for row in grid.rows
    )
    written = {
        "seed": seed(grid),
        "rows": {
            name: {
                "losses": {
                    f"{factor:g}": loss if math.isfinite(loss) else None
                    for factor, loss in losses.items()
                },
                "chosen": best[name],
            }
            for name, losses in found.items()
        },
    }
    write_whole(grid.folder / CHOICE, json.dumps(written, indent=1))
    return replace(grid, rows=rows, sweep=())


def _lowest(losses: dict[float, float]) -> float | None:
    """Return the factor with the lowest loss, None if no trial ended."""
    best = min(losses, key=losses.__getitem__)
    return best if math.isfinite(losses[best]) else None


def told(folder: Path) -> list[str]:
    """Say what was tried in a comparison, and what was taken; [] without a sweep."""
    file = folder / CHOICE
    if not file.is_file():
        return []
    said = read_json(file)
    rows = []
    for name, row in said["rows"].items():
        tried = ", ".join(
            f"x {factor} {'failed' if loss is None else f'{loss:.4f}'}"
            for factor, loss in row["losses"].items()
        )
        taken = "none" if row["chosen"] is None else f"x {row['chosen']:g}"
        rows.append(f"{name} {tried}: {taken} is taken")
    return [
        f"Every row tried its connector's learning rate times some factors, with seed "
        f"{said['seed']}; the lowest held-out loss decides. {'; '.join(rows)}."
    ]


def held_out(run: Path) -> float:
    """Return the held-out loss at the end of a run; infinity for a run that did not get there."""
    if not Run(run).finished:
        return math.inf
    last = read_table(run / "metrics.csv")[-1]
    value = float(last["held_out_loss"] or "inf")
    return value if math.isfinite(value) else math.inf
