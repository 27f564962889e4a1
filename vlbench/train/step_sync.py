"""What all processes must know of an optimizer step before they take it together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from vlbench.data.filler_batches import empty_batch
from vlbench.data.optimizer_step import OptimizerStep, StepCounts
from vlbench.data.packing import PackedBatch
from vlbench.distributed import collectives


def sync_step(step: OptimizerStep) -> StepCounts:
    """Return the counts of a step over all processes; `step` gets all their bad samples.

    `micro_batches` is the largest number of them that a process has: all run as many.
    """
    counts = collectives.all_gather_numbers(
        [step.skipped_samples, len(step.bad_samples), *step.counts]
    )
    step.skipped_samples = int(counts[:, 0].sum())
    _gather_bad_samples(step, 0, int(counts[:, 1].sum()))
    return _sum_counts(counts[:, 2:].tolist())


def sync_lost_samples(step: OptimizerStep, known_bad_samples: int) -> StepCounts | None:
    """Return the counts of a step again if any process has lost samples on loading, else None.

    `known_bad_samples` are those that `step` had before; it gets the others of all processes.
    """
    lost_count = len(step.bad_samples) - known_bad_samples
    counts = collectives.all_gather_numbers([lost_count, *step.counts])
    lost_count = int(counts[:, 0].sum())
    if not lost_count:
        return None
    _gather_bad_samples(step, known_bad_samples, lost_count)
    return _sum_counts(counts[:, 1:].tolist())


def _gather_bad_samples(step: OptimizerStep, known_count: int, new_count: int) -> None:
    if new_count and collectives.is_distributed():
        own_samples = step.bad_samples[known_count:]
        gathered = collectives.all_gather_objects(own_samples)
        step.bad_samples[known_count:] = [sample for rank in gathered for sample in rank]


def _sum_counts(rank_counts: list[list[float]]) -> StepCounts:
    columns = [[int(count) for count in column] for column in zip(*rank_counts, strict=True)]
    return StepCounts(max(columns[0]), *map(sum, columns[1:]))


def pad_micro_batches(batches: Iterable[PackedBatch], count: int) -> Iterator[PackedBatch]:
    """Yield micro-batches, then empty ones up to `count`, as all take part in every exchange."""
    missing = count
    for batch in batches:
        yield batch
        missing -= 1
    for _ in range(missing):
        yield empty_batch()


def all_reduce_sum(value: float) -> float:
    """Return the sum of a number over all processes."""
    return float(collectives.all_gather_numbers([value]).sum())


def all_reduce_counts(local_counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the sums by name over `local_counts` of all processes; names may differ there."""
    rank_sums: Counter[str] = Counter()
    for counts in local_counts:
        rank_sums.update(counts)
    sums: Counter[str] = Counter()
    for counts in collectives.all_gather_objects(dict(rank_sums)):
        sums.update(counts)
    return dict(sorted(sums.items()))
