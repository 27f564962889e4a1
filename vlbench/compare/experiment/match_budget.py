"""`compare match=params|visual_tokens|flops`: give the rows of a comparison the same budget.

Every connector names options that make it larger or smaller (`Connector.size_options`). Of each row
a few change, and as little as possible: by what options and budget move, in logarithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlbench.compare.experiment.candidates import RowCandidates, SizeCandidate
from vlbench.compare.experiment.grid import ComparisonGrid, GridRow, load_recipe
from vlbench.compare.report.report_warnings import MATCH_TOLERANCE
from vlbench.config.overrides import format_override
from vlbench.model.connector_cost import ConnectorCostCounter
from vlbench.text_tables import format_table


@dataclass(frozen=True)
class BudgetMatch:
    """A row, and what was found for it."""

    row: GridRow
    """With the words that give it its new options."""
    options: dict[str, Any]
    """Those that change."""
    own_budget: int
    """Its budget."""
    matched_budget: int
    relative_distance: float
    """Distance from the rows that match, as a share of their budget; 0 for these."""
    mismatch_reason: str
    """What keeps it from matching; "" if it does."""


def match_budgets(grid: ComparisonGrid) -> ComparisonGrid:
    """Give the rows of a grid the same budget, if that is wanted, and say what was changed."""
    if grid.budget_to_match is None:
        return grid
    print(f"match={grid.budget_to_match}: trying sizes of {len(grid.rows)} connectors", flush=True)
    found = match_rows(grid.rows, grid.budget_to_match)
    print("\n".join(f"  {line}" for line in format_match_table(found, grid.budget_to_match)))
    return replace(grid, rows=tuple(one.row for one in found))


def match_rows(rows: Sequence[GridRow], budget_name: str) -> list[BudgetMatch]:
    """Return what gives `rows` the same budget within MATCHED; it depends on them alone.

    `by` is one of grid.BUDGETS. Where no budget suits all rows, it is one that suits the most; the
    others come as near as they can.
    """
    found = [
        RowCandidates(row, counter, budget_name)
        for row, counter in zip(rows, _cost_counters(rows), strict=True)
    ]
    settled = False
    while not settled:
        picks, inside = _pick_best(found)
        settled = all([of.verify_budget(pick) for of, pick in zip(found, picks, strict=True)])
    alike = [pick.budget for pick, fits in zip(picks, inside, strict=True) if fits]
    low, high = min(alike), max(alike)
    return [
        _make_match(of, pick, 0.0 if fits else max(pick.budget / low - 1, 1 - pick.budget / high))
        for of, pick, fits in zip(found, picks, inside, strict=True)
    ]


def format_match_table(matches: Sequence[BudgetMatch], budget_name: str) -> list[str]:
    """Return lines for people: rows, the options that change, their budgets."""
    lines = [("row", "changed", f"own {budget_name}", "matched")]
    for one in matches:
        changed = " ".join(format_override(key, value) for key, value in one.options.items()) or "-"
        lines.append((one.row.name, changed, f"{one.own_budget:,}", f"{one.matched_budget:,}"))
    return format_table(lines, "<<>") + [
        f"cannot: {one.row.name} is {100 * one.relative_distance:.0f} % off: {one.mismatch_reason}"
        for one in matches
        if one.mismatch_reason
    ]


def _make_match(
    row_candidates: RowCandidates, pick: SizeCandidate, relative_distance: float
) -> BudgetMatch:
    words = [format_override(f"connector.{key}", value) for key, value in pick.options.items()]
    row = replace(row_candidates.row, overrides=(*row_candidates.row.overrides, *words))
    return BudgetMatch(
        row,
        pick.options,
        row_candidates.own_budget,
        int(pick.budget),
        relative_distance,
        row_candidates.explain_mismatch() if relative_distance else "",
    )


def _cost_counters(rows: Sequence[GridRow]) -> list[ConnectorCostCounter]:
    """Return the cost counter of each row; rows with the same shapes share one."""
    shared: dict[Any, ConnectorCostCounter] = {}
    counters = []
    for row in rows:
        recipe = load_recipe(row, 0)
        sides = tuple(stage.image_size for stage in recipe.stages.values())
        key = (recipe.vision, recipe.language, sides)
        if key not in shared:
            shared[key] = ConnectorCostCounter(*key)
        counters.append(shared[key])
    return counters


def _pick_best(
    candidates_by_row: Sequence[RowCandidates],
) -> tuple[list[SizeCandidate], list[bool]]:
    """Return a candidate for each row, and whether it is one of those that match.

    A budget suits a row that has a candidate from it to MATCHED above it; among those that suit
    the most rows it is the one for which the rows change least.
    """
    targets = np.unique(np.concatenate([of.candidate_budgets for of in candidates_by_row]))
    picked = [_pick_per_target(of, targets) for of in candidates_by_row]
    misses = np.sum([~inside for _, inside, _ in picked], axis=0)
    change = np.sum([moved for _, _, moved in picked], axis=0)
    best = int(np.lexsort((np.round(change, 9), misses))[0])
    picks = [
        of.candidates[index[best]]
        for of, (index, _, _) in zip(candidates_by_row, picked, strict=True)
    ]
    return picks, [bool(inside[best]) for _, inside, _ in picked]


def _pick_per_target(
    row_candidates: RowCandidates, targets: NDArray[np.float64]
) -> tuple[NDArray[Any], ...]:
    """Return for each target a row's candidate, whether it suits, and how much changes.

    It is the one that changes least among those that suit, otherwise the nearest.
    """
    values, changes = (
        row_candidates.candidate_budgets,
        np.array([one.log_change for one in row_candidates.candidates]),
    )
    low = np.searchsorted(values, targets)
    high = np.searchsorted(values, targets * (1 + MATCH_TOLERANCE), side="right")
    below, above = values[np.maximum(low - 1, 0)], values[np.minimum(low, len(values) - 1)]
    closer = np.abs(np.log(below / targets)) < np.abs(np.log(above / targets))
    near = np.searchsorted(values, np.where(closer, below, above))  # the first changes least
    index = np.array(
        [
            start + np.argmin(changes[start:end]) if start < end else other
            for start, end, other in zip(low, high, near, strict=True)
        ]
    )
    return index, low < high, changes[index]
