"""`sweep=0.3,1,3`: every row first tries its connector's learning rate times these factors.

A single rate for all connectors would favour some of them: a Q-Former needs another one than an
MLP. For equal tuning effort, all rows try the same factors for the same number of steps, with a
seed that the comparison does not use. The factor with the lowest held-out language loss is taken;
the evaluation questions take no part in the choice.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

from vlbench.compare.experiment import grid as grids
from vlbench.compare.experiment.grid import ComparisonGrid, GridRow
from vlbench.compare.experiment.run_jobs import TrainingJob
from vlbench.compare.report.finished_runs import SWEEP_FILE, SWEEP_FOLDER
from vlbench.text_files import read_csv, write_atomically
from vlbench.train.run_folder import RunFolder


def trial_jobs(grid: ComparisonGrid) -> list[TrainingJob]:
    """Return the runs that try learning rates, factor by factor; [] without a sweep."""
    return [
        TrainingJob(
            f"{row.name}, rate x {factor:g}",
            (
                *trial_overrides(grid, row, factor),
                f"seed={trial_seed(grid)}",
                f"run={trial_folder(grid, row, factor)}",
            ),
            trial_folder(grid, row, factor),
        )
        for factor in grid.lr_factors
        for row in grid.rows
    ]


def trial_seed(grid: ComparisonGrid) -> int:
    """Return the seed of the trials, which no run of the comparison has."""
    return max(grid.seeds) + 1


def trial_folder(grid: ComparisonGrid, row: GridRow, factor: float) -> Path:
    """Return the run folder of a trial."""
    return grid.folder / SWEEP_FOLDER / row.name / f"x{factor:g}"


def trial_overrides(grid: ComparisonGrid, row: GridRow, factor: float) -> tuple[str, ...]:
    """Return the overrides of `fit` for a trial; one question, because only its loss is used."""
    return (
        with_lr_factor(grid, row, factor)
        .with_overrides({"log.questions": 1, "log.examples": 0})
        .overrides
    )


def with_lr_factor(grid: ComparisonGrid, row: GridRow, factor: float) -> GridRow:
    """Return the row with its connector's learning rate multiplied in every stage."""
    rates = {
        f"stages.{name}.train.connector.lr": stage.trained_parts["connector"].lr * factor
        for name, stage in grids.load_recipe(row, trial_seed(grid)).stages.items()
        if "connector" in stage.trained_parts
    }
    return row.with_overrides({key: f"{rate:.6g}" for key, rate in rates.items()})


def apply_best_lr(grid: ComparisonGrid) -> ComparisonGrid:
    """Return the grid with the best rate in every row, and write all losses to sweep.json.

    A row none of whose trials finished keeps its rates.
    """
    losses_by_row = {
        row.name: {
            factor: held_out_loss(trial_folder(grid, row, factor)) for factor in grid.lr_factors
        }
        for row in grid.rows
    }
    best = {name: _best_factor(losses) for name, losses in losses_by_row.items()}
    rows = tuple(
        row if (factor := best[row.name]) is None else with_lr_factor(grid, row, factor)
        for row in grid.rows
    )
    sweep_record = {
        "seed": trial_seed(grid),
        "rows": {
            name: {
                "losses": {
                    f"{factor:g}": loss if math.isfinite(loss) else None
                    for factor, loss in losses.items()
                },
                "chosen": best[name],
            }
            for name, losses in losses_by_row.items()
        },
    }
    write_atomically(grid.folder / SWEEP_FILE, json.dumps(sweep_record, indent=1))
    return replace(grid, rows=rows, lr_factors=())


def _best_factor(losses: dict[float, float]) -> float | None:
    """Return the factor with the lowest loss, None if no trial finished."""
    best = min(losses, key=losses.__getitem__)
    return best if math.isfinite(losses[best]) else None


def held_out_loss(run_folder: Path) -> float:
    """Return the last held-out loss of a run; infinity if it is not finished or not finite."""
    if not RunFolder(run_folder).is_finished:
        return math.inf
    last = read_csv(run_folder / "metrics.csv")[-1]
    loss = float(last["held_out_loss"] or "inf")
    return loss if math.isfinite(loss) else math.inf
