"""What a row of a comparison may become: a few of its `Connector.size_options` changed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlbench.compare.experiment.grid import GridRow, load_recipe
from vlbench.compare.report.report_warnings import MATCH_TOLERANCE
from vlbench.config.overrides import parse_overrides
from vlbench.connector import registry
from vlbench.errors import UserError, suggest_name
from vlbench.model.build_vlm import recipe_connector_options
from vlbench.model.connector_cost import BUDGET_COUNTS, ConnectorCostCounter

MAX_CHANGED_OPTIONS = 2  # options of a row, at most: a reader must see what was done to it


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

    def __init__(self, row: GridRow, cost_counter: ConnectorCostCounter, budget_name: str) -> None:
        """Count the row's own budget and those with one option changed; foretell those with two."""
        recipe = load_recipe(row, 0)
        self.row, self.connector_name, self.own_options = (
            row,
            recipe.connector["name"],
            recipe_connector_options(recipe),
        )
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
            if self._cost_counter.fits_all_stages(self._connector_class, options)
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
            built = self._cost_counter.build_connector(
                self._connector_class, {**self.own_options, **options}
            )
        except ValueError:
            return None
        value = self._count_budget(self._cost_counter, built)
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
