"""Finished runs as the points of curves, by the plan of their comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vlbench.compare.report.curve_plan import CurvePlan, row_folder_name
from vlbench.compare.report.finished_runs import ComparisonArm, FinishedRun
from vlbench.compare.report.row_groups import differing_keys, group_into_arms
from vlbench.errors import UserError
from vlbench.text_tables import list_some

MAX_NAMED = 3  # runs in a sentence


def arms_of_points(
    runs: Sequence[FinishedRun], plan: CurvePlan
) -> tuple[list[ComparisonArm], CurvePlan]:
    """Return an arm for each point that has runs, named by it, and the plan of these points."""
    arms, finished = [], []
    for point in plan.points:
        own = [run for run in runs if row_folder_name(run.folder) == point.row]
        found = group_into_arms(own) if own else []
        if len(found) > 1:
            raise UserError(
                f"the runs of {point.name} are not of the same recipe: they differ in "
                f"{', '.join(differing_keys(found))}"
            )
        arms += [replace(arm, name=point.name) for arm in found]
        finished += [point.row] if found else []
    if not arms:
        raise UserError(f"none of the runs is a point of the curves of {', '.join(plan.curves)}")
    return arms, plan.only(finished)


def left_out_note(runs: Sequence[FinishedRun], plan: CurvePlan) -> list[str]:
    """Return a sentence on runs of the comparison that are points of no curve, [] without any."""
    rows = {point.row for point in plan.points}
    others = [str(run.folder) for run in runs if row_folder_name(run.folder) not in rows]
    if not others:
        return []
    named = list_some(others, MAX_NAMED)
    return [f"Left out, because they are points of none of the curves: {named}."]


def compared_groups(
    arms: Sequence[ComparisonArm], plan: CurvePlan | None
) -> list[list[ComparisonArm]]:
    """Return the arms that are compared with one another: those of a budget, or else all."""
    if plan is None:
        return [list(arms)]
    by_name = {arm.name: arm for arm in arms}
    return [[by_name[point.name] for point in points] for points in plan.points_by_budget()]
