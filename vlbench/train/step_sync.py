"""What all processes must know of an optimizer step before they take it together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vlbench.data.batch_sampler import OptimizerStep
from vlbench.data.packing import PackedBatch, empty_batch
from vlbench.distributed import collectives


@dataclass
class SyncedStep:
    """An optimizer step with its counts over the global batch."""

    micro_batches: list[PackedBatch]
    """The micro-batches of this process; every process has the same number."""
    supervised_tokens: int
    tokens: int
    images: int
    samples: int


def sync_step(step: OptimizerStep) -> SyncedStep:
    """Return a step with the counts of all processes; `step` gets all their bad samples.

    Processes with fewer micro-batches get empty ones, as all take part in every exchange.
    """
    batches = step.micro_batches
    counts = collectives.all_gather_numbers(
        [
            len(batches),
            len(step.bad_samples),
            step.skipped_samples,
            sum(batch.supervised_token_count for batch in batches),
            sum(sum(map(sum, batch.sample_lengths)) for batch in batches),
            sum(len(batch.pixels) for batch in batches),
            sum(len(batch.sample_ids) for batch in batches),
        ]
    )
    _, bad_count, step.skipped_samples, *totals = [int(count) for count in counts.sum(0)]
    if bad_count and collectives.is_distributed():
        step.bad_samples = [
            sample for rank in collectives.all_gather_objects(step.bad_samples) for sample in rank
        ]
    most_batches = int(counts[:, 0].max())
    padding = [empty_batch() for _ in range(most_batches - len(batches))]
    return SyncedStep([*batches, *padding], *totals)


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
