"""`sweep=0.3,1,3`: every row first tries its connector's learning rate times these factors.

A single rate for all connectors would favour some of them: a Q-Former needs another one than an
MLP. For equal tuning effort, all rows try the same factors for the same number of steps, with a
seed that no comparison has, also not when seeds are added later. With `sweep.PART=` other parts are
tried, too: every combination of factors is a trial. The lowest held-out language loss is taken; it
is measured on samples that the evaluation asks nothing about.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from vlbench.compare.experiment import grid as grids
from vlbench.compare.experiment.grid import ComparisonGrid, GridRow
from vlbench.compare.experiment.run_jobs import TrainingJob
from vlbench.compare.experiment.sweep_factors import DEFAULT_PART
from vlbench.compare.report.sweep_summary import (
    SWEEP_FILE,
    SWEEP_FOLDER,
    SWEEP_SEED,
    describe_factors,
)
from vlbench.text_files import read_csv, write_atomically
from vlbench.train.run_folder import RunFolder

TrialFactors = Mapping[str, float]
"""Part of the model -> the factor of its learning rate in a trial."""


def list_trials(grid: ComparisonGrid) -> list[TrialFactors]:
    """Return the factors of every trial of a row: all combinations; [] without a sweep."""
    if not grid.lr_factors:
        return []
    combinations = itertools.product(*grid.lr_factors.values())
    return [dict(zip(grid.lr_factors, factors, strict=True)) for factors in combinations]


def trial_jobs(grid: ComparisonGrid) -> list[TrainingJob]:
    """Return the runs that try learning rates, factor by factor; [] without a sweep."""
    return [
        TrainingJob(
            f"{row.name}, rate {describe_factors(factors)}",
            (
                *trial_overrides(row, factors),
                f"seed={SWEEP_SEED}",
                f"run={trial_folder(grid, row, factors)}",
            ),
            trial_folder(grid, row, factors),
        )
        for factors in list_trials(grid)
        for row in grid.rows
    ]


def trial_folder(grid: ComparisonGrid, row: GridRow, factors: TrialFactors) -> Path:
    """Return the run folder of a trial."""
    name = "_".join(
        f"x{factor:g}" if part == DEFAULT_PART else f"{part}-x{factor:g}"
        for part, factor in factors.items()
    )
    return grid.folder / SWEEP_FOLDER / row.name / name


def trial_overrides(row: GridRow, factors: TrialFactors) -> tuple[str, ...]:
    """Return the overrides of `fit` for a trial; one question, because only its loss is used."""
    tried = with_lr_factors(row, factors)
    return tried.with_overrides({"log.questions": 1, "log.examples": 0}).overrides


def with_lr_factors(row: GridRow, factors: TrialFactors) -> GridRow:
    """Return the row with the learning rates of some parts multiplied in every stage."""
    rates = {
        f"stages.{name}.train.{part}.lr": stage.trained_parts[part].lr * factor
        for name, stage in grids.load_recipe(row, SWEEP_SEED).stages.items()
        for part, factor in factors.items()
        if part in stage.trained_parts
    }
    return row.with_overrides({key: f"{rate:.6g}" for key, rate in rates.items()})


def apply_best_lr(grid: ComparisonGrid) -> ComparisonGrid:
    """Return the grid with the best rates in every row, and write all losses to sweep.json.

    A row none of whose trials finished keeps its rates.
    """
    trials = list_trials(grid)
    losses_by_row = {
        row.name: [held_out_loss(trial_folder(grid, row, factors)) for factors in trials]
        for row in grid.rows
    }
    best = {name: _best_trial(trials, losses) for name, losses in losses_by_row.items()}
    rows = tuple(
        row if (factors := best[row.name]) is None else with_lr_factors(row, factors)
        for row in grid.rows
    )
    sweep_record = {
        "seed": SWEEP_SEED,
        "factors": grid.lr_factors,
        "rows": {
            name: {
                "trials": [
                    {"factors": factors, "loss": loss if math.isfinite(loss) else None}
                    for factors, loss in zip(trials, losses, strict=True)
                ],
                "chosen": best[name],
            }
            for name, losses in losses_by_row.items()
        },
    }
    write_atomically(grid.folder / SWEEP_FILE, json.dumps(sweep_record, indent=1))
    return replace(grid, rows=rows, lr_factors={})


def _best_trial(trials: list[TrialFactors], losses: list[float]) -> TrialFactors | None:
    """Return the factors with the lowest loss, of equal ones the nearest to the recipe's rates.

    None if no trial finished.
    """

    def change(factors: TrialFactors) -> float:
        return sum(abs(math.log(factor)) for factor in factors.values())

    loss, _, best = min(
        (loss, change(factors), number)
        for number, (factors, loss) in enumerate(zip(trials, losses, strict=True))
    )
    return trials[best] if math.isfinite(loss) else None


def held_out_loss(run_folder: Path) -> float:
    """Return the last held-out loss of a run; infinity if it is not finished or not finite."""
    if not RunFolder(run_folder).is_finished:
        return math.inf
    rows = read_csv(run_folder / "metrics.csv")
    loss = float(rows[-1]["held_out_loss"] or "inf") if rows else math.inf
    return loss if math.isfinite(loss) else math.inf
