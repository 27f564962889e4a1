"""The sources of a mixture in turn: which one is at a position, and how many of it came before.

Samples that are read block by block are read in an order that stays in a few blocks for a while
(`shard_sampler`), which a random order of the whole epoch would tear apart. Here a stretch of the
epoch has of every source what is its due, and is shuffled by itself; each source is taken in its
own order. Both directions are arithmetic on the shares: no list of an epoch's samples.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence

STRETCH_SAMPLES = 1024  # shuffled together


class SourceInterleave:
    """The turns of sources in an epoch that takes `shares` samples of them."""

    def __init__(self, shares: Sequence[int], seed: int) -> None:
        """Shuffle by `seed`; every epoch has another order."""
        self.shares, self.seed = tuple(shares), seed
        self._total = sum(shares)

    def locate(self, epoch: int, position: int) -> tuple[int, int]:
        """Return the source at a position of an epoch, and its samples before in this epoch."""
        if len(self.shares) == 1:
            return 0, position
        stretch = position // STRETCH_SAMPLES
        while self._start_of(stretch) > position:
            stretch -= 1
        while self._start_of(stretch + 1) <= position:
            stretch += 1
        starts, ends = self._taken_before(stretch), self._taken_before(stretch + 1)
        counts = tuple(end - start for start, end in zip(starts, ends, strict=True))
        turns = _shuffle_turns(counts, f"{self.seed}/epoch {epoch}/stretch {stretch}")
        source, earlier = turns[position - sum(starts)]
        return source, starts[source] + earlier

    def _start_of(self, stretch: int) -> int:
        return sum(self._taken_before(stretch))

    def _taken_before(self, stretch: int) -> list[int]:
        """Return how many samples of each source come before a stretch: its due, rounded."""
        begin = min(stretch * STRETCH_SAMPLES, self._total)
        return [(2 * begin * share + self._total) // (2 * self._total) for share in self.shares]


@functools.lru_cache(maxsize=16)
def _shuffle_turns(counts: tuple[int, ...], stretch_key: str) -> list[tuple[int, int]]:
    """Return the turns of a stretch: a source, and how many of it came before in the stretch."""
    sources = [source for source, count in enumerate(counts) for _ in range(count)]
    random.Random(stretch_key).shuffle(sources)
    return list(_number_turns(sources, len(counts)))


def _number_turns(sources: Sequence[int], source_count: int) -> Iterator[tuple[int, int]]:
    earlier = [0] * source_count
    for source in sources:
        yield source, earlier[source]
        earlier[source] += 1
