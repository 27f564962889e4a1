"""`sweep=0.3,1,3`: every row first tries its connector's learning rate times these factors.

A single rate for all connectors would favour some of them: a Q-Former needs another one than an
MLP. For equal tuning effort, all rows try the same factors for the same number of steps, with a
seed that no comparison has, also not when seeds are added later. With `sweep.PART=` other parts are
tried, too: every combination of factors is a trial. The lowest held-out language loss is taken; it
is measured on samples that the evaluation asks nothing about. Once a run of a row was begun with
these rates, the row keeps them, whatever is tried later: sweep.json says what runs were trained
with.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vlbench.compare.experiment import grid as grids
from vlbench.compare.experiment.grid import ComparisonGrid, GridRow
from vlbench.compare.experiment.run_jobs import TrainingJob
from vlbench.compare.experiment.sweep_factors import DEFAULT_PART
from vlbench.compare.report.sweep_record import (
    RowSweep,
    SweepRecord,
    TrialRecord,
    read_sweep,
    write_sweep,
)
from vlbench.compare.report.sweep_summary import SWEEP_FOLDER, SWEEP_SEED, describe_factors
from vlbench.errors import UserError
from vlbench.text_files import read_csv
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


def settled_grid(grid: ComparisonGrid) -> ComparisonGrid:
    """Return the grid with the rows alone whose rates no trial changes any more.

    Without a sweep these are all. With one they are those with a run that was begun, with any seed:
    they keep the rates that the sweep chose then. A UserError for a row begun without the sweep.
    """
    if not grid.lr_factors:
        return grid
    recorded = read_sweep(grid.folder).rows
    begun = [row for row in grid.rows if is_begun(grid, row)]
    for row in begun:
        if row.name not in recorded:
            raise UserError(
                f"{grid.folder / row.name} has runs that were begun without a sweep, so that their "
                "rates are not for it to choose; give a new folder, run=DIR, or leave sweep= out"
            )
    rows = tuple(_with_choice(row, recorded[row.name].chosen) for row in begun)
    return replace(grid, rows=rows, lr_factors={})


def possible_choices(grid: ComparisonGrid) -> dict[str, list[TrialFactors]]:
    """Return the factors that may be taken for each row: those of its trials, or those it keeps."""
    recorded = read_sweep(grid.folder).rows
    return {
        row.name: [recorded[row.name].chosen or dict.fromkeys(grid.lr_factors, 1.0)]
        if row.name in recorded and is_begun(grid, row)
        else list_trials(grid)
        for row in grid.rows
    }


def is_begun(grid: ComparisonGrid, row: GridRow) -> bool:
    """Tell whether a run of a row was begun, with any seed."""
    return any((grid.folder / row.name).glob("seed*/recipe.yaml"))


def apply_best_lr(grid: ComparisonGrid) -> ComparisonGrid:
    """Return the grid with the chosen rates in every row, and write all losses to sweep.json.

    They are those of the lowest loss, or those that the row's runs were begun with; a row none of
    whose trials finished keeps its own. What the file says of rows outside the grid stays.
    """
    recorded = read_sweep(grid.folder).rows
    sweeps = {
        row.name: _keep_choice(recorded[row.name], _sweep_row(grid, row))
        if row.name in recorded and is_begun(grid, row)
        else _sweep_row(grid, row)
        for row in grid.rows
    }
    write_sweep(grid.folder, SweepRecord(seed=SWEEP_SEED, rows={**recorded, **sweeps}))
    rows = tuple(_with_choice(row, sweeps[row.name].chosen) for row in grid.rows)
    return replace(grid, rows=rows, lr_factors={})


def forget_unused_choices(grid: ComparisonGrid) -> None:
    """Take rows out of sweep.json whose runs will not have the rates that it says.

    They are those of a grid without a sweep that were not begun when there was one.
    """
    record = read_sweep(grid.folder)
    unused = {
        row.name
        for row in grid.rows
        if row.name in record.rows
        and any(factor != 1 for factor in (record.rows[row.name].chosen or {}).values())
        and not is_begun(grid, row)
    }
    if unused:
        rows = {name: sweep for name, sweep in record.rows.items() if name not in unused}
        write_sweep(grid.folder, SweepRecord(seed=record.seed, rows=rows))


def _with_choice(row: GridRow, chosen: TrialFactors | None) -> GridRow:
    return row if chosen is None else with_lr_factors(row, chosen)


def _sweep_row(grid: ComparisonGrid, row: GridRow) -> RowSweep:
    """Return the trials of a row, and the one with the lowest loss."""
    losses = [
        (factors, held_out_loss(trial_folder(grid, row, factors))) for factors in list_trials(grid)
    ]
    trials = [
        TrialRecord(factors=dict(factors), loss=loss if math.isfinite(loss) else None)
        for factors, loss in losses
    ]
    return RowSweep(trials=trials, chosen=_best_factors(trials))


def _keep_choice(before: RowSweep, now: RowSweep) -> RowSweep:
    """Return what was chosen before, with the trials of both; a loss that is known stays."""
    tried = {tuple(trial.factors.items()): trial for trial in before.trials}
    tried |= {
        factors: trial
        for trial in now.trials
        if (factors := tuple(trial.factors.items())) not in tried or trial.loss is not None
    }
    return RowSweep(trials=list(tried.values()), chosen=before.chosen)


def _best_factors(trials: Sequence[TrialRecord]) -> dict[str, float] | None:
    """Return the factors with the lowest loss, of equal ones the nearest to the recipe's rates.

    None if no trial finished.
    """
    finished = [
        (trial.loss, sum(abs(math.log(factor)) for factor in trial.factors.values()), number)
        for number, trial in enumerate(trials)
        if trial.loss is not None
    ]
    return trials[min(finished)[2]].factors if finished else None


def held_out_loss(run_folder: Path) -> float:
    """Return the last held-out loss of a run; infinity if it is not finished or not finite."""
    if not RunFolder(run_folder).is_finished:
        return math.inf
    rows = read_csv(run_folder / "metrics.csv")
    loss = float(rows[-1]["held_out_loss"] or "inf") if rows else math.inf
    return loss if math.isfinite(loss) else math.inf
