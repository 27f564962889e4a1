"""Where does one curve overtake another? Confidence sets of crossings, by Fieller's method.

Between two budgets a curve is a straight line over the logarithm of the budget. The difference of
two curves at any budget x is then a weighted sum of four rows' accuracies, whose standard error
comes from seeds and questions as that of any difference of rows does. The confidence set of a
crossing is every x at which this difference is not significant: at the true crossing the difference
is 0, so it is left out in 5 of 100 comparisons, however flat the curves (Fieller 1954,
doi:10.1111/j.2517-6161.1954.tb00159.x). Nothing is resampled: three seeds are too few for it. The
set may reach to the end of what was measured, where it is cut and that is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vlbench.compare.report.paired_statistics import RowStatistics

GRID_STEPS = 40  # between two budgets, at which the difference is tested; ends are interpolated

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class UndecidedRange:
    """Budgets at which two curves are not told apart, and where their means cross in it."""

    low: float
    high: float
    reaches_start: bool
    """Whether it begins at the smallest budget, so that it has no lower end."""
    reaches_end: bool
    crossings: tuple[float, ...]
    """Budgets at which the means are equal; often none."""
    first_rises: bool
    """Whether the first curve is the better one behind the last of these crossings."""

    @property
    def is_overtaking(self) -> bool:
        """Whether another curve is the better one behind it than before."""
        return len(self.crossings) % 2 == 1

    @property
    def is_bounded(self) -> bool:
        """Whether it ends on both sides within what was measured."""
        return not self.reaches_start and not self.reaches_end


def find_undecided(
    statistics: RowStatistics,
    first_rows: Sequence[int],
    second_rows: Sequence[int],
    budgets: Sequence[float],
) -> list[UndecidedRange]:
    """Return the ranges in which two curves are not told apart with 95 % confidence.

    `first_rows` and `second_rows` are the numbers of the curves' rows at each of the `budgets`,
    which rise. The ranges together are the confidence set of a crossing.
    """
    logs = np.log(np.asarray(budgets, float))
    gaps = statistics.accuracies[list(first_rows)] - statistics.accuracies[list(second_rows)]
    roots = _find_roots(logs, gaps)
    between = [np.linspace(*ends, GRID_STEPS, endpoint=False) for ends in pairwise(logs)]
    places = np.unique(np.concatenate([*between, logs[-1:], roots]))
    tested = [
        statistics.contrast(
            _interpolation_weights(place, logs, first_rows, statistics.row_count)
            - _interpolation_weights(place, logs, second_rows, statistics.row_count)
        )
        for place in places
    ]
    means, half_widths = np.array(tested).T
    surplus = np.abs(means) - half_widths  # above 0: told apart
    ranges = []
    for start, end in _runs_below_zero(surplus):
        low = _zero_between(places, surplus, start - 1, start) if start else places[0]
        is_last = end == len(places) - 1
        high = places[-1] if is_last else _zero_between(places, surplus, end, end + 1)
        inside = tuple(float(np.exp(root)) for root in roots if low <= root <= high)
        rises = bool(means[end if is_last else end + 1] > 0)
        ranges.append(
            UndecidedRange(
                float(np.exp(low)),
                float(np.exp(high)),
                start == 0,
                is_last,
                inside,
                rises,
            )
        )
    return ranges


def _find_roots(logs: Floats, gaps: Floats) -> Floats:
    """Return where the interpolated gap changes its sign, in rising order."""
    roots = []
    for left, right in pairwise(np.flatnonzero(gaps)):
        if gaps[left] * gaps[right] < 0:
            share = gaps[left] / (gaps[left] - gaps[right])
            is_equal = logs[left + 1 : right]  # budgets at which the gap is exactly 0
            on_line = logs[left] + share * (logs[right] - logs[left])
            roots.append(is_equal.mean() if len(is_equal) else on_line)
    return np.array(roots)


def _interpolation_weights(
    place: float, logs: Floats, rows: Sequence[int], row_count: int
) -> Floats:
    """Return weights `[rows of the comparison]` that give a curve's accuracy at a log budget."""
    weights = np.zeros(row_count)
    for index, row in enumerate(rows):
        weights[row] = np.interp(place, logs, np.eye(len(rows))[index])
    return weights


def _runs_below_zero(values: Floats) -> list[tuple[int, int]]:
    """Return first and last index of every run of values at most 0."""
    below = np.concatenate([[False], values <= 0, [False]]).astype(int)
    starts, ends = np.flatnonzero(np.diff(below) == 1), np.flatnonzero(np.diff(below) == -1) - 1
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def _zero_between(places: Floats, values: Floats, left: int, right: int) -> float:
    """Return where the line between two values is 0."""
    share = values[left] / (values[left] - values[right])
    return float(places[left] + share * (places[right] - places[left]))
