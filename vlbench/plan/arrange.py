"""The arrangements of a training, and the cheapest that fits into a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vlbench.model.recompute import WAYS
from vlbench.plan.memory import Memory, StageMemory, total
from vlbench.plan.work import Work

STRATEGIES = ("ddp", "fsdp2")
"""From the one that talks least."""


@dataclass(frozen=True)
class Arrangement:
    """A strategy and a way of recomputing, with the rows of the recipe."""

    strategy: str
    way: str
    memory: Memory
    """Of the stage that needs most."""
    stage: str
    operations: float
    """Of the whole training, what is repeated included."""
    fits: bool


def arrangements(
    stages: Mapping[str, StageMemory],
    works: Mapping[str, Work],
    rows: Mapping[str, int],
    room: float,
    strategies: tuple[str, ...] = STRATEGIES,
) -> list[Arrangement]:
    """Return all arrangements; `rows` are the row_tokens of the stages."""
    found = []
    for strategy in strategies:
        for way in WAYS:
            needed = {n: one.memory(strategy, way, rows[n]) for n, one in stages.items()}
            name = max(needed, key=lambda stage: total(needed[stage]))
            operations = sum(work.operations(way) for work in works.values())
            fits = total(needed[name]) <= room
            found.append(Arrangement(strategy, way, needed[name], name, operations, fits))
    return found


def cheapest(
    found: list[Arrangement],
    stages: Mapping[str, StageMemory],
    rows: Mapping[str, int],
    room: float,
) -> tuple[Arrangement, dict[str, int]] | None:
    """Return what takes least and fits, with the row_tokens that have to change.

    Rows are made shorter only where nothing fits with those of the recipe. None: nothing fits.
    """
    in_order = sorted(found, key=lambda one: one.operations)  # stable: ddp stays before fsdp2
    for one in in_order:
        if one.fits:
            return one, {}
    for one in in_order:
        shorter = {
            name: min(rows[name], stage.largest(one.strategy, one.way, rows[name], room))
            for name, stage in stages.items()
        }
        if all(shorter.values()):
            return one, {name: n for name, n in shorter.items() if n != rows[name]}
    return None
