"""Whether rows were still improving when their training ended, by the curves of their losses.

Losses fall about as a power of the steps: a straight line on two logarithmic axes. It is fitted to
the last part of the last stage, run by run; with three runs or more a t test asks whether their
slopes are below 0 on average, which rests on nothing but that seeds are independent, and with fewer
the scatter around the lines does. A fall that is real but small is no reason for a caution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from vlbench.errors import UserError
from vlbench.text_files import read_csv

FITTED_SHARE = 0.6
"""Of a stage's steps, those at its end that the line is fitted to."""
MIN_POINTS = 3  # of a run's curve
MIN_SEEDS = 3  # for a t test over runs
NOTABLE_FALL = 0.15
"""Of the loss, over the last third of the steps. A cosine schedule that ends at 0 gives about 0.13
to a run that more steps do not help (the tiny yivl_llava)."""
TREND_LEVEL = 0.05  # one-sided

LossCurve = Sequence[tuple[int, float]]
"""(step, loss) of one run in one stage."""


class LossFall(NamedTuple):
    """By how much the loss of a row still fell."""

    stage: str
    share: float
    """Of the loss, over the last third of the steps."""
    is_held_out: bool


def find_fall(curves: Sequence[LossCurve]) -> float | None:
    """Return by which share a row's loss fell over the last third, None if not by a notable one.

    `curves` are of the row's runs; None, too, where their points are too few to tell.
    """
    fits = [_fit_line(curve) for curve in curves]
    known = [fit for fit in fits if fit is not None]
    if not known or len(known) < len(fits):
        return None
    slopes = np.array([fit.slope for fit in known])
    mean_slope = float(slopes.mean())
    fall = 1 - 1.5**mean_slope  # from two thirds of the steps to all of them
    if fall < NOTABLE_FALL:
        return None
    if len(slopes) >= MIN_SEEDS:
        degrees, error = len(slopes) - 1, float(slopes.std(ddof=1)) / math.sqrt(len(slopes))
    else:
        degrees = sum(fit.point_count - 2 for fit in known)
        residual = math.sqrt(sum(fit.squared_residuals for fit in known) / degrees)
        error = residual * math.sqrt(sum(1 / fit.spread for fit in known)) / len(known)
    p_value = float(stats.t.cdf(mean_slope / max(error, 1e-12), degrees))
    return fall if p_value <= TREND_LEVEL else None


class _LineFit(NamedTuple):
    slope: float
    squared_residuals: float
    spread: float
    """Sum of the squared distances of the log steps from their mean."""
    point_count: int


def _fit_line(curve: LossCurve) -> _LineFit | None:
    """Fit the log of losses against the log of steps; None for too few or impossible points."""
    last = max((step for step, _ in curve), default=0)
    points = [point for point in curve if point[0] >= (1 - FITTED_SHARE) * last]
    if len(points) < MIN_POINTS or not all(step > 0 and loss > 0 for step, loss in points):
        return None
    x, y = (np.log(np.array(values, dtype=float)) for values in zip(*points, strict=True))
    x = x - x.mean()
    spread = float(x @ x)
    slope = float(x @ y) / spread
    residuals = y - y.mean() - slope * x
    return _LineFit(slope, float(residuals @ residuals), spread, len(points))


def row_fall(run_folders: Sequence[Path], stage: str) -> LossFall | None:
    """Return how the loss of a row's runs still fell at the end of a stage, if notably.

    The held-out loss is taken where every run has enough of it, otherwise that of training.
    """
    tables = [read_csv(folder / "metrics.csv") for folder in run_folders]
    for column in ("held_out_loss", "loss"):
        curves = [_read_curve(table, stage, column) for table in tables]
        if all(_fit_line(curve) is not None for curve in curves):
            fall = find_fall(curves)
            return None if fall is None else LossFall(stage, fall, column != "loss")
    return None


def _read_curve(
    table: Sequence[Mapping[str, str]], stage: str, column: str
) -> list[tuple[int, float]]:
    """Return the (step, loss) pairs of a stage; a line cut off by a kill has no `seconds`."""
    try:
        points = [
            (int(line["step"]), float(line[column]))
            for line in table
            if line.get("stage") == stage and line.get("seconds") and line.get(column)
        ]
    except (KeyError, ValueError) as error:
        raise UserError(f"metrics.csv: column {column} is no curve ({error})") from error
    return [point for point in points if math.isfinite(point[1])]
