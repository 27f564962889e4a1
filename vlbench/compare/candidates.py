"""What a row of a comparison may become: its own options, a few of `Connector.sizes` changed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlbench import plugins
from vlbench.compare.cautions import MATCHED
from vlbench.compare.grid import Row, load
from vlbench.mistakes import Mistake, nearest
from vlbench.model.compose import options_of
from vlbench.model.frame import COUNTS, Frame
from vlbench.words import tree

CHANGED = 2  # options of a row, at most: a reader must see what was done to it


@dataclass(frozen=True)
class Candidate:
    """What a row may become."""

    options: dict[str, Any]
    """Those that change."""
    value: float
    """Its budget, which may be foretold."""
    change: float
    """How far options and budget move from the row's own: the sum of the logarithms of ratios."""


class Candidates:
    """All that a row may become; `known` is in the order of budgets."""

    def __init__(self, row: Row, frame: Frame, by: str) -> None:
        """Count the row's own budget and those with one option changed; foretell those with two."""
        recipe = load(row, 0)
        self.row, self.name, self.own = row, recipe.connector["name"], options_of(recipe)
        self._frame, self._count = frame, COUNTS[by]
        self._class = plugins.connector(self.name)
        self._settled: set[str] = set()
        try:
            self.before = self._count(frame, frame.build(self._class, self.own))
        except ValueError as error:
            raise Mistake(f"row {row.name}: {error}") from error
        if not self.before:
            raise Mistake(f"row {row.name}: connector {self.name} has no {by} to match")
        singles = [self._singles(option, values) for option, values in self._free().items()]
        useful = [found for found in singles if any(self._moves(one) for one in found)]
        self.known = [Candidate({}, self.before, 0.0), *itertools.chain(*useful)]
        for several in range(2, CHANGED + 1):
            for group in itertools.combinations(useful, several):
                self.known += [self._together(some) for some in itertools.product(*group)]
        self._sort()

    @property
    def values(self) -> NDArray[np.float64]:
        """Return the budgets, in rising order."""
        return np.array([one.value for one in self.known])

    def settle(self, one: Candidate) -> bool:
        """Count a candidate that was picked; tell whether it is what was foretold.

        If not, its true budget takes its place, or nothing, where it does not suit every stage.
        """
        key = repr(one.options)
        if key in self._settled or not one.options:
            return True
        self._settled.add(key)
        options = {**self.own, **one.options}
        true = self._counted(one.options) if self._frame.suits(self._class, options) else None
        if true is not None and true.value == one.value:
            return True
        self.known.remove(one)
        self.known += [true] if true is not None else []
        self._sort()
        return False

    def why(self) -> str:
        """Say why the row is not nearer to the others."""
        if not self._class.sizes:
            return f"connector {self.name} names no sizes"
        given = [name for name in self._class.sizes if name not in self._free()]
        kept = f" with {', '.join(given)} as given" if given else ""
        return f"no sizes of connector {self.name} come nearer{kept}"

    def _free(self) -> dict[str, Sequence[Any]]:
        """Return the options that may change, with their values: not those that somebody typed."""
        for option in self._class.sizes:
            if option not in self.own:
                raise Mistake(
                    f"connector '{self.name}': sizes has '{option}', which is no option of it; it "
                    f"takes: {', '.join(self.own)}.{nearest(option, self.own)}"
                )
        given = tree(list(self.row.words))[0].get("connector", {})
        if not isinstance(given, dict):  # connector={...}: all of it is
            return {}
        return {name: tried for name, tried in self._class.sizes.items() if name not in given}

    def _singles(self, option: str, values: Sequence[Any]) -> list[Candidate]:
        found = [self._counted({option: value}) for value in values if value != self.own[option]]
        return [one for one in found if one is not None]

    def _counted(self, options: dict[str, Any]) -> Candidate | None:
        """Return a candidate with its true budget; None if its options do not go together."""
        try:
            built = self._frame.build(self._class, {**self.own, **options})
        except ValueError:
            return None
        value = self._count(self._frame, built)
        return self._candidate(options, value) if value else None

    def _together(self, some: Sequence[Candidate]) -> Candidate:
        """Return the candidate that changes all options of `some`; budgets multiply, about."""
        options = {key: value for one in some for key, value in one.options.items()}
        ratio = math.prod(one.value / self.before for one in some)
        return self._candidate(options, self.before * ratio)

    def _candidate(self, options: dict[str, Any], value: float) -> Candidate:
        moved = sum(_apart(self.own[key], new) for key, new in options.items())
        return Candidate(options, value, moved + _apart(self.before, value))

    def _moves(self, one: Candidate) -> bool:
        return _apart(self.before, one.value) > math.log1p(MATCHED)

    def _sort(self) -> None:
        self.known.sort(key=lambda one: (one.value, one.change))


def _apart(one: Any, other: Any) -> float:
    """Return the logarithm of the ratio of two numbers, without its sign; 1 for other values."""
    numbers = all(isinstance(value, int | float) and value > 0 for value in (one, other))
    return abs(math.log(other / one)) if numbers else float(one != other)
