"""`compare match=params|visual_tokens|flops`: give the rows of a comparison the same budget.

Every connector names options that make it larger or smaller (`Connector.sizes`). Of each row at
most CHANGED of them change, and as little as possible: by what the budget and the options move, in
logarithms. Most budgets are foretold from those of single options; what is picked has been counted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlbench import plugins
from vlbench.compare.grid import Row, load
from vlbench.compare.report import MATCHED
from vlbench.mistakes import Mistake, nearest
from vlbench.model.compose import options_of
from vlbench.model.frame import BUDGETS, Frame
from vlbench.words import tree, typed

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


@dataclass(frozen=True)
class Match:
    """A row, and what was found for it."""

    row: Row
    """With the words that give it its new options."""
    options: dict[str, Any]
    """Those that change."""
    before: int
    """Its budget."""
    after: int
    off: float
    """Distance from the rows that match, as a share of their budget; 0 for these."""
    why: str
    """What keeps it from matching; "" if it does."""


class Candidates:
    """All that a row may become; `list` is in the order of budgets."""

    def __init__(self, row: Row, frame: Frame, by: str) -> None:
        """Count the row's own budget and those with one option changed; foretell those with two."""
        recipe = load(row, 0)
        self.row, self.name, self.own = row, recipe.connector["name"], options_of(recipe)
        self._frame, self._count = frame, BUDGETS[by]
        self._class = plugins.connector(self.name)
        self._settled: set[str] = set()
        try:
            self.before = self._count(frame, frame.build(self._class, self.own))
        except ValueError as error:
            raise Mistake(f"row {row.name}: {error}") from error
        singles = [self._singles(option, values) for option, values in self._free().items()]
        useful = [found for found in singles if any(self._moves(one) for one in found)]
        self.list = [Candidate({}, self.before, 0.0), *itertools.chain(*useful)]
        for several in range(2, CHANGED + 1):
            for group in itertools.combinations(useful, several):
                self.list += [self._together(some) for some in itertools.product(*group)]
        self._sort()

    @property
    def values(self) -> NDArray[np.float64]:
        """Return the budgets, in rising order."""
        return np.array([one.value for one in self.list])

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
        self.list.remove(one)
        self.list += [true] if true is not None else []
        self._sort()
        return False

    def why(self) -> str:
        """Say why the row is not nearer to the others."""
        if len(self.list) > 1:
            return f"no sizes of connector {self.name} come nearer"
        given = sorted(set(self._class.sizes) - set(self._free()))
        if given:
            return f"{', '.join(given)} of connector {self.name} as given"
        return f"connector {self.name} has no sizes that change it"

    def _free(self) -> dict[str, Sequence[Any]]:
        """Return the options that may change, with their values: not those that somebody typed."""
        for option in self._class.sizes:
            if option not in self.own:
                raise Mistake(
                    f"connector '{self.name}': sizes has '{option}', which is no option of it; it "
                    f"takes: {', '.join(self.own)}.{nearest(option, self.own)}"
                )
        typed_ = tree(list(self.row.words))[0].get("connector", {})
        whole = not isinstance(typed_, dict)  # connector={...}
        sizes = self._class.sizes.items()
        return {} if whole else {name: values for name, values in sizes if name not in typed_}

    def _singles(self, option: str, values: Sequence[Any]) -> list[Candidate]:
        found = [self._counted({option: value}) for value in values if value != self.own[option]]
        return [one for one in found if one is not None]

    def _counted(self, options: dict[str, Any]) -> Candidate | None:
        """Return a candidate with its true budget; None if its options do not go together."""
        try:
            built = self._frame.build(self._class, {**self.own, **options})
        except ValueError:
            return None
        return self._candidate(options, self._count(self._frame, built))

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
        self.list.sort(key=lambda one: (one.value, one.change))


def solve(rows: Sequence[Row], by: str) -> list[Match]:
    """Return what gives `rows` the same budget within MATCHED; it depends on them alone.

    `by` is one of BUDGETS. Where no budget suits all rows, it is one that suits the most; the
    others come as near as they can.
    """
    found = [Candidates(row, frame, by) for row, frame in zip(rows, _frames(rows), strict=True)]
    while True:
        picks, inside = _best(found)
        if all([of.settle(pick) for of, pick in zip(found, picks, strict=True)]):
            break
    low, *_, high = sorted(pick.value for pick, fits in zip(picks, inside, strict=True) if fits) * 2
    return [
        _match(of, pick, 0.0 if fits else max(pick.value / low - 1, 1 - pick.value / high))
        for of, pick, fits in zip(found, picks, inside, strict=True)
    ]


def table(found: Sequence[Match], by: str) -> list[str]:
    """Return lines for people: rows, the options that change, their budgets."""
    lines = [("row", "changed", f"own {by}", "matched")]
    for one in found:
        changed = " ".join(typed(key, value) for key, value in one.options.items()) or "-"
        lines.append((one.row.name, changed, f"{one.before:,}", f"{one.after:,}"))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    shown = [
        "  ".join([*map(str.ljust, line[:2], widths), *map(str.rjust, line[2:], widths[2:])])
        for line in lines
    ]
    return shown + [
        f"cannot: {one.row.name} is {100 * one.off:.0f} % off: {one.why}" for one in found if one.why
    ]


def _match(of: Candidates, pick: Candidate, off: float) -> Match:
    words = [typed(f"connector.{key}", value) for key, value in pick.options.items()]
    row = replace(of.row, words=(*of.row.words, *words))
    return Match(row, pick.options, of.before, int(pick.value), off, of.why() if off else "")


def _frames(rows: Sequence[Row]) -> list[Frame]:
    """Return the frame of each row; rows that have the same one share it."""
    made: dict[Any, Frame] = {}
    frames = []
    for row in rows:
        recipe = load(row, 0)
        sides = tuple(stage.image_size for stage in recipe.stages.values())
        key = (recipe.vision, recipe.language, sides)
        if key not in made:
            made[key] = Frame(recipe)
        frames.append(made[key])
    return frames


def _best(found: Sequence[Candidates]) -> tuple[list[Candidate], list[bool]]:
    """Return a candidate for each row, and whether it is one of those that match.

    A budget suits a row that has a candidate from it to MATCHED above it; among those that suit
    the most rows it is the one for which the rows change least.
    """
    targets = np.unique(np.concatenate([of.values for of in found]))
    picked = [_picks(of, targets) for of in found]
    misses = sum(~inside for _, inside, _ in picked)
    change = sum(moved for _, _, moved in picked)
    best = int(np.lexsort((np.round(change, 9), misses))[0])
    picks = [of.list[index[best]] for of, (index, _, _) in zip(found, picked, strict=True)]
    return picks, [bool(inside[best]) for _, inside, _ in picked]


def _picks(of: Candidates, targets: NDArray[np.float64]) -> tuple[NDArray[Any], ...]:
    """Return for each target a row's candidate, whether it suits, and how much changes.

    It is the one that changes least among those that suit, otherwise the nearest.
    """
    values, changes = of.values, np.array([one.change for one in of.list])
    low = np.searchsorted(values, targets)
    high = np.searchsorted(values, targets * (1 + MATCHED), side="right")
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


def _apart(one: Any, other: Any) -> float:
    """Return the logarithm of the ratio of two numbers, without its sign; 1 for other values."""
    numbers = all(isinstance(value, int | float) and value > 0 for value in (one, other))
    return abs(math.log(other / one)) if numbers else float(one != other)
