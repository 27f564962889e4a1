"""Budget curves of a comparison: points with intervals, steps, crossings, frontiers by kind."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlbench.compare.report.curve_crossings import UndecidedRange, find_undecided
from vlbench.compare.report.curve_frontiers import Frontier, find_frontiers
from vlbench.compare.report.curve_plan import CurvePlan, CurvePoint, point_name
from vlbench.compare.report.paired_statistics import PairedDifference, RowStatistics
from vlbench.compare.report.question_kinds import KINDS, columns_by_kind
from vlbench.compare.report.row_pairs import RowPair, compare_pairs


@dataclass(frozen=True)
class MeasuredPoint:
    """A point of a curve with its accuracy and the ends of its 95 % interval."""

    budget: int
    accuracy: float
    interval_low: float
    interval_high: float


@dataclass(frozen=True)
class CurveStep:
    """What a curve gains from a budget to the next one."""

    lower: int
    higher: int
    gain: PairedDifference
    """Of the higher budget over the lower one."""
    pair: RowPair
    """The same with the better row first, and p corrected over the steps of all curves."""

    @property
    def is_significant(self) -> bool:
        """Whether the two budgets differ by more than chance, one way or the other."""
        return self.pair.is_significant


@dataclass(frozen=True)
class BudgetCurve:
    """The accuracy of a row over its budgets."""

    name: str
    points: tuple[MeasuredPoint, ...]
    steps: tuple[CurveStep, ...]
    points_by_kind: Mapping[str, tuple[MeasuredPoint, ...]]
    """Kind of question -> points."""
    gains_by_kind: Mapping[str, tuple[PairedDifference, ...]]
    """Kind of question -> gain of every step."""


@dataclass(frozen=True)
class CurvePair:
    """Two curves at the budgets that both have."""

    first: str
    second: str
    pairs: tuple[RowPair, ...]
    """Their difference at each of these budgets, p corrected over those of all curves."""
    budgets: tuple[int, ...]
    undecided: tuple[UndecidedRange, ...]
    """Where they are not told apart; [] for curves with one budget in common."""

    def better_at(self, budget: int) -> str:
        """Return the curve that is better at a budget by more than chance, "" for neither."""
        pair = self.pairs[self.budgets.index(budget)]
        if not pair.is_significant:
            return ""
        return self.first if pair.better == point_name(self.first, budget) else self.second

    def is_certain(self, crossing: UndecidedRange) -> bool:
        """Return whether the curves cross there by more than chance.

        That is so if one of them is better at a budget before it, and the other at one behind, with
        p-values corrected over all that are tested.
        """
        before = {self.better_at(one) for one in self.budgets if one <= crossing.low}
        behind = {self.better_at(one) for one in self.budgets if one >= crossing.high}
        winner = self.first if crossing.first_rises else self.second
        loser = self.second if crossing.first_rises else self.first
        return crossing.is_overtaking and loser in before and winner in behind


@dataclass(frozen=True)
class CurveFindings:
    """All curves of a comparison, and what was found of them."""

    plan: CurvePlan
    curves: tuple[BudgetCurve, ...]
    curve_pairs: tuple[CurvePair, ...]
    frontiers: tuple[Frontier, ...]
    """Of all questions, then of every kind."""
    seed_count: int


def analyze_curves(
    plan: CurvePlan,
    row_names: Sequence[str],
    statistics: RowStatistics,
    tested: Sequence[RowPair],
    question_kinds: Sequence[Mapping[str, str]],
) -> CurveFindings:
    """Return what was found of the curves.

    Args:
        plan: The points, all of which have a row.
        row_names: Names of the rows, in the order of the statistics.
        statistics: Those of all questions.
        tested: The differences of `plan.tested_pairs()`.
        question_kinds: For every question its name by kind, as `group_questions` takes it.
    """
    columns_of = columns_by_kind(question_kinds)
    counts = Counter(name for _, name in columns_of)
    kinds = {
        name if counts[name] == 1 else f"{KINDS[rank]} {name}": statistics.of_questions(columns)
        for (rank, name), columns in columns_of.items()
        if len(columns) < statistics.question_count  # a kind of its own
    }
    numbers = {name: index for index, name in enumerate(row_names)}
    steps = plan.steps()
    step_pairs = compare_pairs(row_names, statistics, plan.number_pairs(row_names, steps))
    found_steps = {
        step: CurveStep(
            step[0].value,
            step[1].value,
            _gain(statistics, numbers, step),
            pair,
        )
        for step, pair in zip(steps, step_pairs, strict=True)
    }
    curves = []
    for name in plan.curves:
        points = plan.points_of(name)
        own_steps = list(itertools.pairwise(points))
        curves.append(
            BudgetCurve(
                name,
                _measure_points(points, numbers, statistics),
                tuple(found_steps[step] for step in own_steps),
                {kind: _measure_points(points, numbers, one) for kind, one in kinds.items()},
                {
                    kind: tuple(_gain(one, numbers, step) for step in own_steps)
                    for kind, one in kinds.items()
                },
            )
        )
    return CurveFindings(
        plan,
        tuple(curves),
        tuple(_compare_curves(plan, numbers, statistics, tested)),
        tuple(find_frontiers(plan, numbers, {"": statistics, **kinds})),
        statistics.seed_count,
    )


def _gain(
    statistics: RowStatistics, numbers: Mapping[str, int], step: tuple[CurvePoint, CurvePoint]
) -> PairedDifference:
    low, high = step
    return statistics.difference(numbers[high.name], numbers[low.name])


def _measure_points(
    points: Sequence[CurvePoint], numbers: Mapping[str, int], statistics: RowStatistics
) -> tuple[MeasuredPoint, ...]:
    return tuple(
        MeasuredPoint(point.value, *statistics.accuracy_interval(numbers[point.name]))
        for point in points
    )


def _compare_curves(
    plan: CurvePlan,
    numbers: Mapping[str, int],
    statistics: RowStatistics,
    tested: Sequence[RowPair],
) -> list[CurvePair]:
    """Return every two curves that have a budget in common."""
    by_names = {frozenset((pair.better, pair.worse)): pair for pair in tested}
    found = []
    for first, second in itertools.combinations(plan.curves, 2):
        others = {point.value: point for point in plan.points_of(second)}
        common = [(one, others[one.value]) for one in plan.points_of(first) if one.value in others]
        if not common:
            continue
        budgets = tuple(one.value for one, _ in common)
        first_rows, second_rows = zip(
            *((numbers[one.name], numbers[other.name]) for one, other in common), strict=True
        )
        found.append(
            CurvePair(
                first,
                second,
                tuple(by_names[frozenset((one.name, other.name))] for one, other in common),
                budgets,
                tuple(find_undecided(statistics, first_rows, second_rows, budgets))
                if len(common) > 1
                else (),
            )
        )
    return found
