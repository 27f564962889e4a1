"""What all processes must know of a step before they take it together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vlbench import ranks
from vlbench.data.batch import Batch, empty
from vlbench.data.steps import Step


@dataclass
class Plan:
    """An optimizer step as all processes know it: numbers are of the global batch."""

    batches: list[Batch]
    """The micro-batches of this process, as many as every other has."""
    supervised: int
    tokens: int
    images: int
    samples: int


def agree(step: Step) -> Plan:
    """Return what a step is over all processes, and note all its bad samples in `step`.

    Those with fewer micro-batches run empty ones: all have to meet in what they exchange.
    """
    mine = step.batches
    table = ranks.table(
        [
            len(mine),
            len(step.bad),
            step.skipped,
            sum(batch.tokens for batch in mine),
            sum(sum(map(sum, batch.lengths)) for batch in mine),
            sum(len(batch.pixels) for batch in mine),
            sum(len(batch.sample_id) for batch in mine),
        ]
    )
    _, bad, step.skipped, *numbers = [int(number) for number in table.sum(0)]
    if bad and ranks.several():
        step.bad = [one for theirs in ranks.everyone(step.bad) for one in theirs]
    most = int(table[:, 0].max())
    return Plan([*mine, *(empty() for _ in range(most - len(mine)))], *numbers)


def total(value: float) -> float:
    """Return the sum of a number over all processes."""
    return float(ranks.table([value]).sum())


def totals(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the sums by name over `counts` and all processes; not all need to know a name."""
    mine: Counter[str] = Counter()
    for one in counts:
        mine.update(one)
    sums: Counter[str] = Counter()
    for theirs in ranks.everyone(dict(mine)):
        sums.update(theirs)
    return dict(sorted(sums.items()))
