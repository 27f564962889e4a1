"""What all processes must know of a step before they take it together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vlbench.data.batch_sampler import OptimizerStep
from vlbench.data.packing import PackedBatch, empty_batch
from vlbench.distributed import collectives


@dataclass
class SyncedStep:
    """An optimizer step as all processes know it: numbers are of the global batch."""

    micro_batches: list[PackedBatch]
    """The micro-batches of this process, as many as every other has."""
    supervised_tokens: int
    tokens: int
    images: int
    samples: int


def sync_step(step: OptimizerStep) -> SyncedStep:
    """Return what a step is over all processes, and note all its bad samples in `step`.

    Those with fewer micro-batches run empty ones: all have to meet in what they exchange.
    """
    mine = step.micro_batches
    table = collectives.all_gather_numbers(
        [
            len(mine),
            len(step.bad_samples),
            step.skipped_samples,
            sum(batch.supervised_token_count for batch in mine),
            sum(sum(map(sum, batch.sample_lengths)) for batch in mine),
            sum(len(batch.pixels) for batch in mine),
            sum(len(batch.sample_ids) for batch in mine),
        ]
    )
    _, bad, step.skipped_samples, *numbers = [int(number) for number in table.sum(0)]
    if bad and collectives.is_distributed():
        step.bad_samples = [
            one for theirs in collectives.all_gather_objects(step.bad_samples) for one in theirs
        ]
    most = int(table[:, 0].max())
    return SyncedStep([*mine, *(empty_batch() for _ in range(most - len(mine)))], *numbers)


def all_reduce_sum(value: float) -> float:
    """Return the sum of a number over all processes."""
    return float(collectives.all_gather_numbers([value]).sum())


def all_reduce_counts(local_counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the sums by name over `counts` and all processes; not all need to know a name."""
    mine: Counter[str] = Counter()
    for one in local_counts:
        mine.update(one)
    sums: Counter[str] = Counter()
    for theirs in collectives.all_gather_objects(dict(mine)):
        sums.update(theirs)
    return dict(sorted(sums.items()))
