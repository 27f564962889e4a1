"""`compare match=params|visual_tokens|flops`: give the rows of a comparison the same budget.

Every connector names options that make it larger or smaller (`Connector.size_options`). Of each row
a few change, and as little as possible: by what options and budget move, in logarithms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlbench.compare.experiment.grid import ComparisonGrid, GridRow, load_recipe
from vlbench.compare.report.finished_runs import MATCH_TOLERANCE
from vlbench.config.overrides import format_override, parse_overrides
from vlbench.connector import registry
from vlbench.errors import UserError, suggest_name
from vlbench.model.build_vlm import recipe_connector_options
from vlbench.model.connector_frame import BUDGET_COUNTS, ConnectorFrame

MAX_CHANGED_OPTIONS = 2  # options of a row, at most: a reader must see what was done to it


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
        RowCandidates(row, frame, budget_name)
        for row, frame in zip(rows, _connector_frames(rows), strict=True)
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
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    shown = [
        "  ".join([*map(str.ljust, line[:2], widths), *map(str.rjust, line[2:], widths[2:])])
        for line in lines
    ]
    return shown + [
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


def _connector_frames(rows: Sequence[GridRow]) -> list[ConnectorFrame]:
    """Return the frame of each row; rows that have the same one share it."""
    made: dict[Any, ConnectorFrame] = {}
    frames = []
    for row in rows:
        recipe = load_recipe(row, 0)
        sides = tuple(stage.image_size for stage in recipe.stages.values())
        key = (recipe.vision, recipe.language, sides)
        if key not in made:
            made[key] = ConnectorFrame(recipe)
        frames.append(made[key])
    return frames


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


@dataclass(frozen=True)
class SizeCandidate:
    """What a row may become."""

    options: dict[str, Any]
    """Those that change."""
    budget: float
    """Its budget, which may be foretold."""
    log_change: float
    """How far options and budget move from the row's own: the sum of the logarithms of ratios."""


class RowCandidates:
    """All that a row may become; `known` is in the order of budgets."""

    def __init__(self, row: GridRow, frame: ConnectorFrame, budget_name: str) -> None:
        """Count the row's own budget and those with one option changed; foretell those with two."""
        recipe = load_recipe(row, 0)
        self.row, self.connector_name, self.own_options = (
            row,
            recipe.connector["name"],
            recipe_connector_options(recipe),
        )
        self._frame, self._count_budget = frame, BUDGET_COUNTS[budget_name]
        self._connector_class = registry.load_connector(self.connector_name)
        self._verified_options: set[str] = set()
        try:
            self.own_budget = self._count_budget(
                frame, frame.build_connector(self._connector_class, self.own_options)
            )
        except ValueError as error:
            raise UserError(f"row {row.name}: {error}") from error
        if not self.own_budget:
            raise UserError(
                f"row {row.name}: connector {self.connector_name} has no {budget_name} to match"
            )
        singles = [
            self._single_changes(option, values)
            for option, values in self._changeable_options().items()
        ]
        useful = [found for found in singles if any(self._has_new_budget(one) for one in found)]
        self.candidates = [SizeCandidate({}, self.own_budget, 0.0), *itertools.chain(*useful)]
        for several in range(2, MAX_CHANGED_OPTIONS + 1):
            for group in itertools.combinations(useful, several):
                self.candidates += [
                    self._combine_candidates(some) for some in itertools.product(*group)
                ]
        self._sort_by_budget()

    @property
    def candidate_budgets(self) -> NDArray[np.float64]:
        """Return the budgets, in rising order."""
        return np.array([one.budget for one in self.candidates])

    def verify_budget(self, candidate: SizeCandidate) -> bool:
        """Count a candidate that was picked; tell whether it is what was foretold.

        If not, its true budget takes its place, or nothing, where it does not suit every stage.
        """
        key = repr(candidate.options)
        if key in self._verified_options or not candidate.options:
            return True
        self._verified_options.add(key)
        options = {**self.own_options, **candidate.options}
        true = (
            self._count_candidate(candidate.options)
            if self._frame.fits_all_stages(self._connector_class, options)
            else None
        )
        if true is not None and true.budget == candidate.budget:
            return True
        self.candidates.remove(candidate)
        self.candidates += [true] if true is not None else []
        self._sort_by_budget()
        return False

    def explain_mismatch(self) -> str:
        """Say why the row is not nearer to the others."""
        if not self._connector_class.size_options:
            return f"connector {self.connector_name} names no sizes"
        given = [
            name
            for name in self._connector_class.size_options
            if name not in self._changeable_options()
        ]
        kept = f" with {', '.join(given)} as given" if given else ""
        return f"no sizes of connector {self.connector_name} come nearer{kept}"

    def _changeable_options(self) -> dict[str, Sequence[Any]]:
        """Return the options that may change, with their values: not those that somebody typed."""
        for option in self._connector_class.size_options:
            if option not in self.own_options:
                raise UserError(
                    f"connector '{self.connector_name}': size_options has '{option}', which is no "
                    "option of it; it "
                    f"takes: {', '.join(self.own_options)}.{suggest_name(option, self.own_options)}"
                )
        given = parse_overrides(list(self.row.overrides))[0].get("connector", {})
        if not isinstance(given, dict):  # connector={...}: all of it is
            return {}
        return {
            name: tried
            for name, tried in self._connector_class.size_options.items()
            if name not in given
        }

    def _single_changes(self, option: str, values: Sequence[Any]) -> list[SizeCandidate]:
        found = [
            self._count_candidate({option: value})
            for value in values
            if value != self.own_options[option]
        ]
        return [one for one in found if one is not None]

    def _count_candidate(self, options: dict[str, Any]) -> SizeCandidate | None:
        """Return a candidate with its true budget; None if its options do not go together."""
        try:
            built = self._frame.build_connector(
                self._connector_class, {**self.own_options, **options}
            )
        except ValueError:
            return None
        value = self._count_budget(self._frame, built)
        return self._make_candidate(options, value) if value else None

    def _combine_candidates(self, candidates: Sequence[SizeCandidate]) -> SizeCandidate:
        """Return the candidate that changes all options of `some`; budgets multiply, about."""
        options = {key: value for one in candidates for key, value in one.options.items()}
        ratio = math.prod(one.budget / self.own_budget for one in candidates)
        return self._make_candidate(options, self.own_budget * ratio)

    def _make_candidate(self, options: dict[str, Any], budget: float) -> SizeCandidate:
        moved = sum(_log_distance(self.own_options[key], new) for key, new in options.items())
        return SizeCandidate(options, budget, moved + _log_distance(self.own_budget, budget))

    def _has_new_budget(self, candidate: SizeCandidate) -> bool:
        return _log_distance(self.own_budget, candidate.budget) > math.log1p(MATCH_TOLERANCE)

    def _sort_by_budget(self) -> None:
        self.candidates.sort(key=lambda one: (one.budget, one.log_change))


def _log_distance(first: Any, second: Any) -> float:
    """Return the logarithm of the ratio of two numbers, without its sign; 1 for other values."""
    numbers = all(isinstance(value, int | float) and value > 0 for value in (first, second))
    return abs(math.log(second / first)) if numbers else float(first != second)
