"""`compare match=params|visual_tokens|flops`: give the rows of a comparison the same budget.

Every connector declares the options that make it larger or smaller (`Connector.size_options`). In
each row at most `MAX_CHANGED_OPTIONS` of them change, and as little as possible: the distance is
the sum of the absolute log ratios of the options and of the budget. No option becomes more than
`match_limit=` times what it was, or less than that part of it: a Flamingo with one gated layer in
32 has the parameters of an MLP, and is no Flamingo.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlbench.command_line.compare_arguments import DEFAULT_MATCH_LIMIT
from vlbench.command_line.overrides import format_override
from vlbench.compare.experiment.grid import ComparisonGrid, GridRow, load_recipe
from vlbench.compare.report.finished_runs import MATCH_TOLERANCE
from vlbench.connector import registry
from vlbench.data.reference_image import REFERENCE_NAME
from vlbench.errors import UserError, suggest_name
from vlbench.model.connector_cost import BUDGET_COUNTS, ConnectorCostCounter
from vlbench.text_tables import format_table
from vlbench.train.resume import load_recipe_with_init
from vlbench.train.shape_checks import cost_counter

MAX_CHANGED_OPTIONS = 2  # per row, so that a reader can still see what was changed


@dataclass(frozen=True)
class BudgetMatch:
    """A row and the options that give it the common budget."""

    row: GridRow
    """The row with overrides that set the changed options."""
    options: dict[str, Any]
    """The options that change, with their new values."""
    own_budget: int
    """Budget of the unchanged row."""
    matched_budget: int
    relative_distance: float
    """Distance from the budgets of the rows that match, as a share of them; 0 for a match."""
    mismatch_reason: str
    """Why the row does not match; "" if it does."""


def match_budgets(grid: ComparisonGrid) -> ComparisonGrid:
    """Return the grid with equal budgets if `match=` asks for it, and print what changed."""
    if grid.budget_to_match is None:
        return grid
    is_tiled = any(
        load_recipe_with_init(row.overrides_for_seed(0)).vision.has_views for row in grid.rows
    )
    image = f", for {REFERENCE_NAME}" if is_tiled and grid.budget_to_match != "params" else ""
    print(
        f"match={grid.budget_to_match}: trying sizes of {len(grid.rows)} connectors{image}",
        flush=True,
    )
    matches = match_rows(grid.rows, grid.budget_to_match, grid.match_limit)
    print("\n".join(f"  {line}" for line in format_match_table(matches, grid.budget_to_match)))
    return replace(grid, rows=tuple(match.row for match in matches))


def match_rows(
    rows: Sequence[GridRow], budget_name: str, match_limit: float = DEFAULT_MATCH_LIMIT
) -> list[BudgetMatch]:
    """Return the changes that give `rows` the same budget within `MATCH_TOLERANCE`.

    `budget_name` is one of `grid.MATCHABLE_BUDGETS`, `match_limit` the largest ratio of an option's
    new value to its own, either way. The result is a pure function of them and the rows.
    Where no budget suits all rows, it is one that suits the most; the others come as near as they
    can.
    """
    candidates_by_row = [
        RowCandidates(row, counter, budget_name, match_limit)
        for row, counter in zip(rows, cost_counters(rows), strict=True)
    ]
    verified = False
    while not verified:
        picks, matching = _pick_best(candidates_by_row)
        # a list, so that every pick is verified before the next round
        verified = all(
            [
                row_candidates.verify_budget(pick)
                for row_candidates, pick in zip(candidates_by_row, picks, strict=True)
            ]
        )
    matched_budgets = [pick.budget for pick, fits in zip(picks, matching, strict=True) if fits]
    low, high = min(matched_budgets), max(matched_budgets)
    return [
        _make_match(
            row_candidates,
            pick,
            0.0 if fits else max(pick.budget / low - 1, 1 - pick.budget / high),
        )
        for row_candidates, pick, fits in zip(candidates_by_row, picks, matching, strict=True)
    ]


def format_match_table(matches: Sequence[BudgetMatch], budget_name: str) -> list[str]:
    """Return the lines of a table: rows, the options that change, budgets before and after."""
    lines = [("row", "changed", f"own {budget_name}", "matched")]
    for match in matches:
        changed = " ".join(format_override(*option) for option in match.options.items()) or "-"
        lines.append(
            (match.row.name, changed, f"{match.own_budget:,}", f"{match.matched_budget:,}")
        )
    return format_table(lines, "<<>") + [
        f"cannot: {match.row.name} is {100 * match.relative_distance:.0f} % off: "
        f"{match.mismatch_reason}"
        for match in matches
        if match.mismatch_reason
    ]


def _make_match(
    row_candidates: RowCandidates, pick: SizeCandidate, relative_distance: float
) -> BudgetMatch:
    changes = [format_override(f"connector.{key}", value) for key, value in pick.options.items()]
    row = replace(row_candidates.row, overrides=(*row_candidates.row.overrides, *changes))
    return BudgetMatch(
        row,
        pick.options,
        row_candidates.own_budget,
        int(pick.budget),
        relative_distance,
        row_candidates.explain_mismatch() if relative_distance else "",
    )


def cost_counters(rows: Sequence[GridRow]) -> list[ConnectorCostCounter]:
    """Return the cost counter of each row; rows with the same shapes share one."""
    shared: dict[Any, ConnectorCostCounter] = {}
    counters = []
    for row in rows:
        recipe = load_recipe_with_init(row.overrides_for_seed(0))
        image_sizes = tuple(stage.image_size for stage in recipe.stages.values())
        key = (recipe.vision, recipe.language, recipe.init, image_sizes)
        if key not in shared:
            shared[key] = cost_counter(recipe.model, image_sizes)
        counters.append(shared[key])
    return counters


def _pick_best(
    candidates_by_row: Sequence[RowCandidates],
) -> tuple[list[SizeCandidate], list[bool]]:
    """Return a candidate for each row, and whether its budget is within the tolerance.

    Every budget of a candidate is tried as the common target. It suits a row that has a candidate
    between it and `MATCH_TOLERANCE` above it. The target that suits the most rows is taken, and of
    several the one for which the rows change least.
    """
    targets = np.unique(
        np.concatenate([candidates.candidate_budgets for candidates in candidates_by_row])
    )
    choices = [_pick_per_target(candidates, targets) for candidates in candidates_by_row]
    misses = np.sum([~suits for _, suits, _ in choices], axis=0)
    change = np.sum([log_changes for _, _, log_changes in choices], axis=0)
    best = int(np.lexsort((np.round(change, 9), misses))[0])
    picks = [
        candidates.candidates[index[best]]
        for candidates, (index, _, _) in zip(candidates_by_row, choices, strict=True)
    ]
    return picks, [bool(suits[best]) for _, suits, _ in choices]


def _pick_per_target(
    row_candidates: RowCandidates, targets: NDArray[np.float64]
) -> tuple[NDArray[Any], ...]:
    """Return for each target the index of a candidate, whether it suits, and its log change.

    Of the candidates that suit a target, it is the one that changes least, otherwise the nearest.
    """
    budgets = row_candidates.candidate_budgets
    changes = np.array([candidate.log_change for candidate in row_candidates.candidates])
    low = np.searchsorted(budgets, targets)
    high = np.searchsorted(budgets, targets * (1 + MATCH_TOLERANCE), side="right")
    below, above = budgets[np.maximum(low - 1, 0)], budgets[np.minimum(low, len(budgets) - 1)]
    is_below_nearer = np.abs(np.log(below / targets)) < np.abs(np.log(above / targets))
    # of candidates with the same budget the first one changes least
    nearest = np.searchsorted(budgets, np.where(is_below_nearer, below, above))
    index = np.array(
        [
            start + np.argmin(changes[start:end]) if start < end else fallback
            for start, end, fallback in zip(low, high, nearest, strict=True)
        ]
    )
    return index, low < high, changes[index]


@dataclass(frozen=True)
class SizeCandidate:
    """A set of changed options that a row may get."""

    options: dict[str, Any]
    """The options that change, with their new values."""
    budget: float
    """Its budget; predicted, not counted, where more than one option changes."""
    log_change: float
    """Sum of the absolute log ratios of options and budget to the row's own."""


class RowCandidates:
    """The candidates of a row, sorted by budget."""

    def __init__(
        self,
        row: GridRow,
        cost_counter: ConnectorCostCounter,
        budget_name: str,
        match_limit: float = math.inf,
    ) -> None:
        """Count the budgets with no and one changed option; predict those with more."""
        recipe = load_recipe(row, 0)
        self.row, self.match_limit = row, match_limit
        self.connector_name: str = recipe.connector["name"]
        self.own_options = recipe.model.connector_options
        self._cost_counter, self._count_budget = cost_counter, BUDGET_COUNTS[budget_name]
        self._connector_class = registry.load_connector(self.connector_name)
        self._verified_options: set[str] = set()
        try:
            self.own_budget = self._count_budget(
                cost_counter, cost_counter.build_connector(self._connector_class, self.own_options)
            )
        except ValueError as error:
            raise UserError(f"row {row.name}: {error}") from error
        if not self.own_budget:
            raise UserError(
                f"row {row.name}: connector {self.connector_name} has no {budget_name} to match"
            )
        self._size_values = self._changeable_options()
        self._near_values = {
            option: [value for value in values if self._is_near(option, value)]
            for option, values in self._size_values.items()
        }
        singles = [self._single_changes(*option) for option in self._near_values.items()]
        # one list per option; options that move no budget take no part
        useful = [changes for changes in singles if any(map(self._has_new_budget, changes))]
        self.candidates = [SizeCandidate({}, self.own_budget, 0.0), *itertools.chain(*useful)]
        for option_count in range(2, MAX_CHANGED_OPTIONS + 1):
            for group in itertools.combinations(useful, option_count):
                self.candidates += map(self._combine_candidates, itertools.product(*group))
        self._sort_by_budget()

    @property
    def candidate_budgets(self) -> NDArray[np.float64]:
        """Return the budgets, in rising order."""
        return np.array([candidate.budget for candidate in self.candidates])

    def verify_budget(self, candidate: SizeCandidate) -> bool:
        """Count the budget of a picked candidate; return whether the prediction was right.

        If not, the candidate is replaced by one with its true budget, or removed where its options
        do not fit every stage.
        """
        key = repr(candidate.options)
        if key in self._verified_options or not candidate.options:
            return True
        self._verified_options.add(key)
        options = {**self.own_options, **candidate.options}
        counted = (
            self._count_candidate(candidate.options)
            if self._cost_counter.fits_all_stages(self._connector_class, options)
            else None
        )
        if counted is not None and counted.budget == candidate.budget:
            return True
        self.candidates.remove(candidate)
        self.candidates += [counted] if counted is not None else []
        self._sort_by_budget()
        return False

    def explain_mismatch(self) -> str:
        """Say why the row does not come nearer to the budget of the others."""
        if not self._connector_class.size_options:
            return f"connector {self.connector_name} names no sizes"
        fixed = [
            name for name in self._connector_class.size_options if name not in self._size_values
        ]
        condition = f" with {', '.join(fixed)} as given" if fixed else ""
        if any(len(self._near_values[k]) < len(values) for k, values in self._size_values.items()):
            condition += (
                f" within {self.match_limit:g} times what it is, either way; "
                f"match_limit={2 * self.match_limit:g} tries more"
            )
        return f"no sizes of connector {self.connector_name} come nearer{condition}"

    def _changeable_options(self) -> dict[str, Sequence[Any]]:
        """Return the size options with their values, without those that the user has set."""
        for option in self._connector_class.size_options:
            if option not in self.own_options:
                raise UserError(
                    f"connector '{self.connector_name}': size_options has '{option}', which is no "
                    "option of it; it "
                    f"takes: {', '.join(self.own_options)}.{suggest_name(option, self.own_options)}"
                )
        given = [word.partition("=")[0] for word in self.row.overrides]
        if "connector" in given:  # connector={...}: all options are set
            return {}
        return {
            name: values
            for name, values in self._connector_class.size_options.items()
            if f"connector.{name}" not in given
        }

    def _is_near(self, option: str, value: Any) -> bool:
        """Tell whether a value is within `match_limit` times the option's own, either way."""
        return _ratio(self.own_options[option], value) <= self.match_limit + 1e-9

    def _single_changes(self, option: str, values: Sequence[Any]) -> list[SizeCandidate]:
        candidates = [
            self._count_candidate({option: value})
            for value in values
            if value != self.own_options[option]
        ]
        return [candidate for candidate in candidates if candidate is not None]

    def _count_candidate(self, options: dict[str, Any]) -> SizeCandidate | None:
        """Return a candidate with its counted budget; None if the connector refuses its options."""
        try:
            connector = self._cost_counter.build_connector(
                self._connector_class, {**self.own_options, **options}
            )
        except ValueError:
            return None
        budget = self._count_budget(self._cost_counter, connector)
        return self._make_candidate(options, budget) if budget else None

    def _combine_candidates(self, candidates: Sequence[SizeCandidate]) -> SizeCandidate:
        """Return one candidate with the options of all; its budget is predicted by ratios."""
        options = {
            key: value for candidate in candidates for key, value in candidate.options.items()
        }
        ratio = math.prod(candidate.budget / self.own_budget for candidate in candidates)
        return self._make_candidate(options, self.own_budget * ratio)

    def _make_candidate(self, options: dict[str, Any], budget: float) -> SizeCandidate:
        change = sum(_log_distance(self.own_options[key], new) for key, new in options.items())
        return SizeCandidate(options, budget, change + _log_distance(self.own_budget, budget))

    def _has_new_budget(self, candidate: SizeCandidate) -> bool:
        return _log_distance(self.own_budget, candidate.budget) > math.log1p(MATCH_TOLERANCE)

    def _sort_by_budget(self) -> None:
        self.candidates.sort(key=lambda candidate: (candidate.budget, candidate.log_change))


def _ratio(first: Any, second: Any) -> float:
    """Return how many times the larger of two positive numbers is the smaller; 1 for others."""
    return math.exp(_log_distance(first, second)) if _are_sizes(first, second) else 1.0


def _log_distance(first: Any, second: Any) -> float:
    """Return the absolute log ratio of two positive numbers; 0 or 1 for other values."""
    return abs(math.log(second / first)) if _are_sizes(first, second) else float(first != second)


def _are_sizes(*values: Any) -> bool:
    return all(isinstance(value, int | float) and value > 0 for value in values)
