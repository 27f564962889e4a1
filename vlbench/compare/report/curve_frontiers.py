"""Which row is best at each budget, for every kind of question, and which others may be.

Affordable at a budget are the rows that need at most as much. Which of them is best is not certain,
so all are listed that may be: a row is left out if another affordable one is better by a one-sided
test at 5 % / (rows - 1). The truly best row is then left out in at most 5 of 100 comparisons, by
Bonferroni's inequality, whichever is seen to be best: subset selection (Gupta 1965,
doi:10.1080/00401706.1965.10490251).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlbench.compare.report.curve_plan import CurvePlan
from vlbench.compare.report.detectable_difference import SIGNIFICANCE_LEVEL
from vlbench.compare.report.paired_statistics import RowStatistics


@dataclass(frozen=True)
class FrontierCell:
    """The rows that may be best at a budget."""

    budget: int
    best: str
    accuracy: float
    interval_low: float
    interval_high: float
    may_be_best: tuple[str, ...]
    """Other rows that are not told apart from the best one, the better ones first."""


@dataclass(frozen=True)
class Frontier:
    """The frontier of a kind of question: a cell for every budget."""

    kind: str
    """"" for all questions."""
    question_count: int
    cells: tuple[FrontierCell, ...]


def find_frontiers(
    plan: CurvePlan, row_numbers: Mapping[str, int], kinds: Mapping[str, RowStatistics]
) -> list[Frontier]:
    """Return the frontier of each kind of question; `row_numbers` has each point's row by name."""
    return [
        Frontier(
            kind,
            statistics.question_count,
            tuple(
                _find_best(
                    value,
                    {one.name: row_numbers[one.name] for one in plan.points if one.value <= value},
                    statistics,
                )
                for value in plan.values
            ),
        )
        for kind, statistics in kinds.items()
    ]


def _find_best(
    budget: int, affordable: Mapping[str, int], statistics: RowStatistics
) -> FrontierCell:
    order = sorted(affordable, key=lambda name: -statistics.accuracies[affordable[name]])
    level = SIGNIFICANCE_LEVEL / max(1, len(order) - 1)
    numbers = [affordable[name] for name in order]
    possible = [
        name
        for place, name in enumerate(order)
        if not _is_beaten(numbers[place], numbers[:place], level, statistics)
    ]
    accuracy, low, high = statistics.accuracy_interval(numbers[0])
    return FrontierCell(budget, order[0], accuracy, low, high, tuple(possible[1:]))


def _is_beaten(
    row: int, better_rows: Sequence[int], level: float, statistics: RowStatistics
) -> bool:
    """Return whether any row is better than this one at the level of a one-sided test."""
    return any(statistics.difference(better, row).p_value / 2 <= level for better in better_rows)
