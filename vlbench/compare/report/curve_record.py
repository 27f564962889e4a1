"""Budget curves for the report as JSON."""

from __future__ import annotations

from typing import Any

from vlbench.compare.report.curve_analysis import (
    BudgetCurve,
    CurveFindings,
    CurvePair,
    MeasuredPoint,
)
from vlbench.compare.report.curve_frontiers import Frontier
from vlbench.compare.report.curve_sentences import all_sentences
from vlbench.compare.report.paired_statistics import PairedDifference


def curves_record(found: CurveFindings) -> dict[str, Any]:
    """Return the curves of a comparison as objects and lists: shares from 0 to 1."""
    return {
        "budget": found.plan.budget,
        "values": found.plan.values,
        "sentences": all_sentences(found),
        "curves": [_curve(curve) for curve in found.curves],
        "pairs": [_curve_pair(pair) for pair in found.curve_pairs],
        "frontiers": [_frontier(frontier) for frontier in found.frontiers],
        "unreached": [
            {
                "curve": one.curve,
                "value": one.value,
                "nearest": list(one.nearest),
                "reason": one.reason,
            }
            for one in found.plan.unreached
        ],
    }


def _point(point: MeasuredPoint) -> dict[str, Any]:
    interval = [point.interval_low, point.interval_high]
    return {"budget": point.budget, "accuracy": point.accuracy, "interval": interval}


def _curve(curve: BudgetCurve) -> dict[str, Any]:
    return {
        "name": curve.name,
        "points": [_point(point) for point in curve.points],
        "steps": [
            {
                "from": step.lower,
                "to": step.higher,
                **_difference(step.gain),
                "p_corrected": step.pair.corrected_p,
                "tests_in_family": step.pair.pair_count,
            }
            for step in curve.steps
        ],
        "kinds": {
            kind: {
                "points": [_point(point) for point in points],
                "steps": [_difference(gain) for gain in curve.gains_by_kind[kind]],
            }
            for kind, points in curve.points_by_kind.items()
        },
    }


def _curve_pair(pair: CurvePair) -> dict[str, Any]:
    return {
        "first": pair.first,
        "second": pair.second,
        "budgets": list(pair.budgets),
        "better": [pair.better_at(budget) or None for budget in pair.budgets],
        "not_told_apart": [
            {
                "interval": [
                    None if one.reaches_start else one.low,
                    None if one.reaches_end else one.high,
                ],
                "crossings_of_means": list(one.crossings),
                "overtaking": (
                    (pair.first if one.first_rises else pair.second) if one.is_overtaking else None
                ),
                "more_than_chance": pair.is_certain(one),
            }
            for one in pair.undecided
        ],
    }


def _frontier(frontier: Frontier) -> dict[str, Any]:
    return {
        "questions": frontier.kind or "all",
        "question_count": frontier.question_count,
        "budgets": [
            {
                "budget": cell.budget,
                "best": cell.best,
                "accuracy": cell.accuracy,
                "interval": [cell.interval_low, cell.interval_high],
                "may_be_best": [cell.best, *cell.may_be_best],
            }
            for cell in frontier.cells
        ],
    }


def _difference(difference: PairedDifference) -> dict[str, Any]:
    return {
        "difference": difference.mean,
        "interval": [difference.interval_low, difference.interval_high],
        "p": difference.p_value,
    }
