"""What the curves of a comparison show, in sentences and tables that every form of report has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vlbench.compare.report.curve_analysis import BudgetCurve, CurveFindings, CurvePair, CurveStep
from vlbench.compare.report.curve_crossings import UndecidedRange
from vlbench.compare.report.curve_frontiers import Frontier, FrontierCell
from vlbench.compare.report.curve_plan import format_budget, point_name
from vlbench.compare.report.paired_statistics import PairedDifference
from vlbench.compare.report.row_pairs import format_count, join_words

MAX_VERDICTS = 3  # sentences at the top of a report


class CurveTable(NamedTuple):
    """A table of texts; the first column names its lines."""

    title: str
    header: list[str]
    lines: list[list[str]]


def family_sentences(found: CurveFindings) -> list[str]:
    """Return what is tested, over what p-values are corrected, and what the curves lack."""
    plan = found.plan
    compared = len(plan.tested_pairs()) if len(plan.curves) > 1 else 0
    steps = len(plan.steps())
    families = []
    if compared:
        families.append(
            f"at each budget the rows that have it against each other ({_tests(compared)})"
        )
    if steps:
        families.append(f"each curve's steps from a budget to the next ({_tests(steps)})")
    tested = " and ".join(families) or "nothing"
    return [
        f"Tested are {tested}, with Holm's correction within each of these families. Rows of "
        "different curves at different budgets are no competitors and are not tested; on kinds of "
        "questions and further tasks the pairs are the same.",
        *(f"{one.sentence(plan.budget)}." for one in plan.unreached),
    ]


def _tests(count: int) -> str:
    return format_count(count, "test")


def verdict_sentence(found: CurveFindings) -> str:
    """Return the main finding: crossings of several curves, or how a single one rises."""
    pairs = [sentence for pair in found.curve_pairs for sentence in crossing_sentences(found, pair)]
    sentences = pairs or [step_sentence(found, curve) for curve in found.curves if curve.steps]
    if len(sentences) > MAX_VERDICTS:
        left = len(sentences) - MAX_VERDICTS
        sentences = [*sentences[:MAX_VERDICTS], f"{left} more findings stand below."]
    alone = ["With one seed this is about these runs alone."] if found.seed_count == 1 else []
    return " ".join([*sentences, *alone])


def all_sentences(found: CurveFindings) -> list[str]:
    """Return what was found of every two curves, then of every curve's steps."""
    crossings = [one for pair in found.curve_pairs for one in crossing_sentences(found, pair)]
    return [*crossings, *(step_sentence(found, curve) for curve in found.curves if curve.steps)]


def crossing_sentences(found: CurveFindings, pair: CurvePair) -> list[str]:
    """Return where one of two curves overtakes the other, or that neither does."""
    crossed = [one for one in pair.undecided if one.crossings]
    if crossed:
        return [_describe_crossing(found, pair, one) for one in crossed]
    gap = sum(
        one.difference.mean * (1 if one.better == point_name(pair.first, budget) else -1)
        for budget, one in zip(pair.budgets, pair.pairs, strict=True)
    )
    winner, loser = (pair.first, pair.second) if gap >= 0 else (pair.second, pair.first)
    certain = [one for one in pair.budgets if pair.better_at(one)]
    budgets = (
        f"at all budgets from {format_budget(pair.budgets[0])} to "
        f"{format_budget(pair.budgets[-1])} {found.plan.label}"
        if len(pair.budgets) > 1
        else f"at {format_budget(pair.budgets[0])} {found.plan.label}, the only budget of both"
    )
    if not certain:
        return [f"{winner} and {loser} differ {budgets} by no more than chance."]
    return [
        f"{winner} is above {loser} {budgets}, by more than chance at {_list_budgets(certain)}."
    ]


def _describe_crossing(found: CurveFindings, pair: CurvePair, crossing: UndecidedRange) -> str:
    """Return a sentence on the crossings of the means within a range."""
    low = f"{'below ' if crossing.reaches_start else ''}{format_budget(crossing.low)}"
    high = f"{'above ' if crossing.reaches_end else ''}{format_budget(crossing.high)}"
    places = _list_budgets(crossing.crossings)
    if not crossing.is_overtaking:
        return (
            f"By the means {pair.first} and {pair.second} cross at {places} {found.plan.label}, "
            f"and from {low} to {high} they are not told apart."
        )
    winner, loser = (pair.first, pair.second) if crossing.first_rises else (pair.second, pair.first)
    said = (
        f"{winner} overtakes {loser} at {places} {found.plan.label} (95 % interval {low} to {high})"
    )
    if pair.is_certain(crossing):
        return f"{said}."
    if crossing.is_bounded:
        return f"By the means {said}; that they cross may be chance."
    return f"By the means {said}; whether they cross at all, this comparison cannot tell."


def _list_budgets(budgets: Sequence[float]) -> str:
    """Return "4, 16 and 64"."""
    return join_words([format_budget(budget) for budget in budgets], "and")


def step_sentence(found: CurveFindings, curve: BudgetCurve) -> str:
    """Return whether a curve rises at every step, with each step's gain."""
    label, count = found.plan.label, len(curve.steps)
    certain = sum(step.is_significant for step in curve.steps)
    how = f"does not rise over {label} at every step"
    if all(step.gain.mean > 0 for step in curve.steps):
        each = "each by more than chance"
        some = f"by more than chance at {certain} of {count}" if certain else "which may be chance"
        how = f"rises over {label} at every step, {each if certain == count else some}"
    steps = ", ".join(_describe_step(step) for step in curve.steps)
    tests = _tests(curve.steps[0].pair.pair_count)
    return (
        f"{curve.name} {how}: {steps}. These are points with 95 % intervals; p after Holm's "
        f"correction over {tests}."
    )


def _describe_step(step: CurveStep) -> str:
    return (
        f"{format_budget(step.lower)} to {format_budget(step.higher)} "
        f"{format_gain(step.gain)} (p {step.pair.corrected_p_text})"
    )


def format_gain(gain: PairedDifference) -> str:
    """Return points with their 95 % interval: "+3.1 [1.0, 5.2]"."""
    mean, low, high = (100 * one for one in (gain.mean, gain.interval_low, gain.interval_high))
    return f"{mean:+.1f} [{low:.1f}, {high:.1f}]"


def curve_tables(found: CurveFindings) -> list[CurveTable]:
    """Return the tables: accuracies, gains of steps by kind of question, frontiers by kind."""
    values = [format_budget(value) for value in found.plan.values]
    label = found.plan.label
    tables = [
        CurveTable(
            f"Accuracy with its 95 % interval at each number of {label}",
            ["curve", *values],
            [_accuracy_line(curve, found.plan.values) for curve in found.curves],
        )
    ]
    steps = [line for curve in found.curves for line in _step_lines(curve)]
    if steps:
        titles = [
            f"{format_budget(low)} to {format_budget(high)}"
            for low, high in _all_steps(found.curves)
        ]
        tables.append(
            CurveTable(
                f"Points gained from one number of {label} to the next, with the 95 % interval",
                ["questions", "curve", *titles],
                [_step_cells(line, _all_steps(found.curves)) for line in steps],
            )
        )
    tables.append(
        CurveTable(
            f"Best row of those that need at most so many {label}, and those that may be best "
            "(together they hold the best one with 95 % confidence)",
            ["questions", *values],
            [_frontier_line(frontier) for frontier in found.frontiers],
        )
    )
    return tables


def _accuracy_line(curve: BudgetCurve, values: Sequence[int]) -> list[str]:
    texts = {
        point.budget: f"{point.accuracy:.3f} ({point.interval_low:.3f} to "
        f"{point.interval_high:.3f})"
        for point in curve.points
    }
    return [curve.name, *(texts.get(value, "") for value in values)]


class _StepLine(NamedTuple):
    kind: str
    curve: str
    gains: dict[tuple[int, int], PairedDifference]


def _step_lines(curve: BudgetCurve) -> list[_StepLine]:
    """Return the gains of a curve, for all questions and for every kind."""
    if not curve.steps:
        return []
    ends = [(step.lower, step.higher) for step in curve.steps]
    by_kind = {"all": tuple(step.gain for step in curve.steps), **curve.gains_by_kind}
    return [
        _StepLine(kind, curve.name, dict(zip(ends, gains, strict=True)))
        for kind, gains in by_kind.items()
    ]


def _all_steps(curves: Sequence[BudgetCurve]) -> list[tuple[int, int]]:
    return sorted({(step.lower, step.higher) for curve in curves for step in curve.steps})


def _step_cells(line: _StepLine, steps: Sequence[tuple[int, int]]) -> list[str]:
    gains = [format_gain(line.gains[step]) if step in line.gains else "" for step in steps]
    return [line.kind, line.curve, *gains]


def _frontier_line(frontier: Frontier) -> list[str]:
    name = f"{frontier.kind or 'all'} ({frontier.question_count})"
    return [name, *(_frontier_text(cell) for cell in frontier.cells)]


def _frontier_text(cell: FrontierCell) -> str:
    interval = f"{cell.accuracy:.3f} ({cell.interval_low:.3f} to {cell.interval_high:.3f})"
    others = f"; may be best too: {', '.join(cell.may_be_best)}" if cell.may_be_best else ""
    return f"{cell.best} {interval}{others}"
