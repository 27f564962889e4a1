"""The order of samples: a pure function of (seed, position), with no list and no state."""

from __future__ import annotations

import functools
import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

from vlbench.data.sample import Sample, Source, sample_at
from vlbench.mistakes import Mistake

_ROUNDS = 6
_MASK = (1 << 64) - 1


class Order:
    """A shuffled order of 0..count-1 that needs no memory, good for 10^8 and more.

    A Feistel network (a bijection on a power of four) keyed by the seed; values beyond `count` are
    sent through again until one falls inside, which keeps it a bijection on 0..count-1.
    """

    def __init__(self, count: int, seed: int | str) -> None:
        """Make the order of `count` things; the same seed gives the same order everywhere."""
        self.count = count
        self._half = max(1, ((count - 1).bit_length() + 1) // 2)  # bits of one half
        self._low = (1 << self._half) - 1
        digest = hashlib.blake2b(str(seed).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = [int.from_bytes(digest[i : i + 8], "big") for i in range(0, 8 * _ROUNDS, 8)]

    def __call__(self, position: int) -> int:
        """Return the index at `position`, both in 0..count-1."""
        if not 0 <= position < self.count:
            raise IndexError(f"position {position} of an order of {self.count}")
        value = self._shuffle(position)
        while value >= self.count:
            value = self._shuffle(value)
        return value

    def _shuffle(self, value: int) -> int:
        left, right = value >> self._half, value & self._low
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._low)
        return left << self._half | right


def _mix(value: int) -> int:
    """Scatter 64 bits (the finalizer of SplitMix64)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


@functools.lru_cache(maxsize=256)
def _order(count: int, seed: str) -> Order:
    return Order(count, seed)


class Mixture:
    """Several sources shuffled into one endless stream of samples.

    A source's weight says how often each of its samples is met per epoch: 2 is twice, 0.5 means
    half of them, and the other half in the next epoch.
    """

    def __init__(self, sources: Sequence[tuple[Source, float]], seed: int) -> None:
        """Mix (source, weight) pairs. Raises a Mistake for an empty source or a bad weight."""
        if not sources:
            raise Mistake("no data: a stage needs at least one source")
        for source, weight in sources:
            if not len(source):
                raise Mistake(f"data {source.name!r} holds no samples")
            if not (math.isfinite(weight) and weight > 0):
                raise Mistake(f"data {source.name!r}: weight is {weight}; it must be above 0")
        self.name = " + ".join(source.name for source, _ in sources)
        self.sources = [source for source, _ in sources]
        self.seed = seed
        self._shares = [max(1, round(len(source) * weight)) for source, weight in sources]
        self._ends = list(accumulate(self._shares))
        self.epoch = self._ends[-1]
        """Samples per epoch."""

    def __len__(self) -> int:
        return self.epoch

    def __getitem__(self, position: int) -> Sample:
        """Return the sample at `position` of the stream, or raise BadSample."""
        number, index = self.at(position)
        return sample_at(self.sources[number], index, number)

    def at(self, position: int) -> tuple[int, int]:
        """Return the number of a source and the index in it at `position` of the stream.

        Every epoch has another order; each sample of a source is met once before any is met again.
        """
        epoch, place = divmod(position, self.epoch)
        slot = _order(self.epoch, f"{self.seed}/epoch {epoch}")(place)
        number = bisect_right(self._ends, slot)
        share, source = self._shares[number], self.sources[number]
        met = epoch * share + slot - (self._ends[number] - share)  # of this source, so far
        turn, rest = divmod(met, len(source))
        return number, self._pass(source, f"{self.seed}/source {number}/pass {turn}")(rest)

    @staticmethod
    def _pass(source: Source, key: str) -> Callable[[int], int]:
        """Return the order of a pass over a source: its own, if some orders are faster to read."""
        own = getattr(source, "order", None)
        return own(key) if own else _order(len(source), key)
