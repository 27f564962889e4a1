"""`compare match=params|visual_tokens|flops`: give the rows of a comparison the same budget.

Every connector names options that make it larger or smaller (`Connector.sizes`). Of each row a few
change, and as little as possible: by what options and budget move, in logarithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlbench.compare.candidates import Candidate, Candidates
from vlbench.compare.cautions import MATCHED
from vlbench.compare.grid import Grid, Row, load
from vlbench.model.frame import Frame
from vlbench.words import typed


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


def matched(grid: Grid) -> Grid:
    """Give the rows of a grid the same budget, if that is wanted, and say what was changed."""
    if grid.match is None:
        return grid
    print(f"match={grid.match}: trying sizes of {len(grid.rows)} connectors", flush=True)
    found = solve(grid.rows, grid.match)
    print("\n".join(f"  {line}" for line in table(found, grid.match)))
    return replace(grid, rows=tuple(one.row for one in found))


def solve(rows: Sequence[Row], by: str) -> list[Match]:
    """Return what gives `rows` the same budget within MATCHED; it depends on them alone.

    `by` is one of grid.BUDGETS. Where no budget suits all rows, it is one that suits the most; the
    others come as near as they can.
    """
    found = [Candidates(row, frame, by) for row, frame in zip(rows, _frames(rows), strict=True)]
    settled = False
    while not settled:
        picks, inside = _best(found)
        settled = all([of.settle(pick) for of, pick in zip(found, picks, strict=True)])
    alike = [pick.value for pick, fits in zip(picks, inside, strict=True) if fits]
    low, high = min(alike), max(alike)
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
        f"cannot: {one.row.name} is {100 * one.off:.0f} % off: {one.why}"
        for one in found
        if one.why
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
    misses = np.sum([~inside for _, inside, _ in picked], axis=0)
    change = np.sum([moved for _, _, moved in picked], axis=0)
    best = int(np.lexsort((np.round(change, 9), misses))[0])
    picks = [of.known[index[best]] for of, (index, _, _) in zip(found, picked, strict=True)]
    return picks, [bool(inside[best]) for _, inside, _ in picked]


def _picks(of: Candidates, targets: NDArray[np.float64]) -> tuple[NDArray[Any], ...]:
    """Return for each target a row's candidate, whether it suits, and how much changes.

    It is the one that changes least among those that suit, otherwise the nearest.
    """
    values, changes = of.values, np.array([one.change for one in of.known])
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
