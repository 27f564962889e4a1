"""`compare curve=...`: every row becomes a curve, with a row of its own for each budget.

    visual_tokens, flops   the sizes of its connector are changed, as `match=` does: at most two
                           options that nobody typed, as little as possible; exactly to the budget
                           if that can be, or else within `CURVE_TOLERANCE` of it
    samples                `steps` of the last stage that runs: samples / global_batch_size. Stages
                           before it, and warm-up and schedule as shares of its steps, stay as they
                           are: every point is a training of its own, not a checkpoint of a longer

However far an option moves (`match_limit=` is of `match=`), what is set is printed for each point.
A budget that a row cannot have is named, with the nearest ones, and its curve lacks the point.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from vlbench.command_line.overrides import format_override
from vlbench.compare.experiment.curve_request import CurveRequest
from vlbench.compare.experiment.grid import ComparisonGrid, GridRow, load_recipe
from vlbench.compare.experiment.match_budget import RowCandidates, SizeCandidate, cost_counters
from vlbench.compare.report.curve_plan import CurvePlan, CurvePoint, UnreachedBudget
from vlbench.compare.report.finished_runs import MATCH_TOLERANCE
from vlbench.errors import UserError
from vlbench.text_tables import format_table

CURVE_TOLERANCE = MATCH_TOLERANCE / 2  # around a budget, so that rows at it match one another


class ReachedBudget(NamedTuple):
    """The overrides that give a row a budget."""

    reached: int
    overrides: dict[str, Any]


BudgetSolver = Callable[[int], ReachedBudget | UnreachedBudget]
"""Finds how a row gets a budget."""


def expand_curves(grid: ComparisonGrid) -> ComparisonGrid:
    """Return the grid with a row for every point if `curve=` asks for it, and print them."""
    request = grid.curve
    if request is None:
        return grid
    print(f"{request.word}: {len(grid.rows)} curves of {len(request.values)} points", flush=True)
    names = _curve_names(grid.rows)
    lines = [("row", "set", request.budget)]
    rows: list[GridRow] = []
    points: list[CurvePoint] = []
    unreached: list[UnreachedBudget] = []
    for row, name, solve in zip(grid.rows, names, _make_solvers(grid, request, names), strict=True):
        for value in request.values:
            found = solve(value)
            if isinstance(found, UnreachedBudget):
                unreached.append(found)
                continue
            point_row = GridRow(f"{row.name}/{request.budget}={value}", row.overrides)
            point_row = point_row.with_overrides(found.overrides)
            rows.append(point_row)
            points.append(CurvePoint(name, value, found.reached, point_row.name))
            changed = " ".join(format_override(*one) for one in found.overrides.items()) or "-"
            lines.append((point_row.name, changed, f"{found.reached:,}"))
    cannot = [f"cannot: {one.sentence(request.budget)}" for one in unreached]
    plan = CurvePlan(request.budget, tuple(points), tuple(unreached))
    _check_points(plan, names, cannot)
    print(*(f"  {line}" for line in [*format_table(lines, "<<>"), *cannot]), sep="\n", flush=True)
    return replace(grid, rows=tuple(rows), curve=None, curve_plan=plan)


def _curve_names(rows: Sequence[GridRow]) -> list[str]:
    """Return what the curves are called: by connectors, or by rows where these do not differ."""
    connectors = [load_recipe(row, 0).connector["name"] for row in rows]
    counts = Counter(connectors)
    return [
        connector if counts[connector] == 1 else row.name
        for row, connector in zip(rows, connectors, strict=True)
    ]


def _check_points(plan: CurvePlan, names: Sequence[str], cannot: Sequence[str]) -> None:
    """Refuse a row without any point, and curves that all have one point alone."""
    counts = Counter(point.curve for point in plan.points)
    empty = [name for name in names if not counts[name]]
    if empty:
        raise UserError(*cannot, f"{' and '.join(empty)} would have no point at all")
    if max(counts.values()) < 2:
        raise UserError(*cannot, "no curve would have two points")


def _make_solvers(
    grid: ComparisonGrid, request: CurveRequest, names: Sequence[str]
) -> list[BudgetSolver]:
    """Return what finds the budgets of each row."""
    if request.budget == "samples":
        return [
            _samples_solver(row, name, grid.seeds[0])
            for row, name in zip(grid.rows, names, strict=True)
        ]
    return [
        # no limit: the budget that was asked for may lie far from the row's own
        _size_solver(RowCandidates(row, counter, request.budget, math.inf), name)
        for row, counter, name in zip(grid.rows, cost_counters(grid.rows), names, strict=True)
    ]


def _samples_solver(row: GridRow, name: str, seed: int) -> BudgetSolver:
    """Return what finds the steps of the row's last stage for a number of samples."""
    recipe = load_recipe(row, seed)
    stage = list(recipe.selected_stages)[-1]
    batch = recipe.stages[stage].global_batch_size
    keys = [f"stages.{stage}.{key}" for key in ("steps", "epochs")]
    typed = [word for word in row.overrides if word.partition("=")[0] in keys]
    if typed:
        raise UserError(f"curve=samples sets {keys[0]}: leave {typed[0]} out")

    def solve(samples: int) -> ReachedBudget | UnreachedBudget:
        steps = max(1, round(samples / batch))
        if abs(steps * batch / samples - 1) > CURVE_TOLERANCE:
            below, above = samples // batch * batch, (samples // batch + 1) * batch
            near = (below, above) if below else (above,)
            reason = f"a step of {stage} has {batch} samples"
            return UnreachedBudget(name, samples, near, reason)
        return ReachedBudget(steps * batch, {keys[0]: steps})

    return solve


def _size_solver(candidates: RowCandidates, name: str) -> BudgetSolver:
    """Return what finds the sizes of the row's connector for a budget."""

    def solve(value: int) -> ReachedBudget | UnreachedBudget:
        pick = _pick_size(candidates, value)
        if pick is None:
            near = _nearest_budgets(candidates, value)
            return UnreachedBudget(name, value, near, candidates.explain_mismatch())
        options = {f"connector.{key}": option for key, option in pick.options.items()}
        return ReachedBudget(int(pick.budget), options)

    return solve


def _pick_size(candidates: RowCandidates, value: int) -> SizeCandidate | None:
    """Return the sizes that change least of those that have a budget, None if none has it."""
    while True:
        near = [
            one for one in candidates.candidates if _distance(one.budget, value) <= CURVE_TOLERANCE
        ]
        exact = [one for one in near if one.budget == value]
        if not near:
            return None
        pick = min(exact or near, key=lambda one: one.log_change)
        if candidates.verify_budget(pick):
            return pick


def _nearest_budgets(candidates: RowCandidates, value: int) -> tuple[int, ...]:
    """Return the nearest budgets that the row can have, below and above."""
    found = []
    for sign in (-1, 1):
        while beyond := [one for one in candidates.candidates if sign * (one.budget - value) > 0]:
            pick = min(beyond, key=lambda one: (_distance(one.budget, value), one.log_change))
            if candidates.verify_budget(pick):
                found.append(int(pick.budget))
                break
    return tuple(found)


def _distance(budget: float, value: int) -> float:
    return abs(math.log(budget / value))
