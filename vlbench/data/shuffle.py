"""The order of samples: a pure function of (seed, position), with no list and no state."""

from __future__ import annotations

import functools
import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

from vlbench.data.sample import Sample, SampleSource, sample_at
from vlbench.errors import UserError

_FEISTEL_ROUNDS = 6
_UINT64_MASK = (1 << 64) - 1


class FeistelShuffle:
    """A shuffled order of 0..count-1 that needs no memory, good for 10^8 and more.

    A Feistel network (a bijection on a power of four) keyed by the seed; values beyond `count` are
    sent through again until one falls inside, which keeps it a bijection on 0..count-1.
    """

    def __init__(self, count: int, seed: int | str) -> None:
        """Make the order of `count` things; the same seed gives the same order everywhere."""
        self.count = count
        self._half_bits = max(1, ((count - 1).bit_length() + 1) // 2)  # bits of one half
        self._half_mask = (1 << self._half_bits) - 1
        digest = hashlib.blake2b(str(seed).encode(), digest_size=8 * _FEISTEL_ROUNDS).digest()
        self._round_keys = [
            int.from_bytes(digest[i : i + 8], "big") for i in range(0, 8 * _FEISTEL_ROUNDS, 8)
        ]

    def __call__(self, position: int) -> int:
        """Return the index at `position`, both in 0..count-1."""
        if not 0 <= position < self.count:
            raise IndexError(f"position {position} of an order of {self.count}")
        value = self._permute_once(position)
        while value >= self.count:
            value = self._permute_once(value)
        return value

    def _permute_once(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._half_mask
        for key in self._round_keys:
            left, right = right, left ^ (_mix_bits(right ^ key) & self._half_mask)
        return left << self._half_bits | right


def _mix_bits(value: int) -> int:
    """Scatter 64 bits (the finalizer of SplitMix64)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _UINT64_MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _UINT64_MASK
    return value ^ value >> 31


@functools.lru_cache(maxsize=256)
def _cached_shuffle(count: int, seed: str) -> FeistelShuffle:
    return FeistelShuffle(count, seed)


class SourceMixture:
    """Several sources shuffled into one endless stream of samples.

    A source's weight says how often each of its samples is met per epoch: 2 is twice, 0.5 means
    half of them, and the other half in the next epoch.
    """

    def __init__(self, sources: Sequence[tuple[SampleSource, float]], seed: int) -> None:
        """Mix (source, weight) pairs. Raises a Mistake for an empty source or a bad weight."""
        if not sources:
            raise UserError("no data: a stage needs at least one source")
        for source, weight in sources:
            if not len(source):
                raise UserError(f"data {source.name!r} holds no samples")
            if not (math.isfinite(weight) and weight > 0):
                raise UserError(f"data {source.name!r}: weight is {weight}; it must be above 0")
        self.name = " + ".join(source.name for source, _ in sources)
        self.sources = [source for source, _ in sources]
        self.seed = seed
        self._epoch_shares = [max(1, round(len(source) * weight)) for source, weight in sources]
        self._share_ends = list(accumulate(self._epoch_shares))
        self.epoch_samples = self._share_ends[-1]
        """Samples per epoch."""

    def __len__(self) -> int:
        return self.epoch_samples

    def __getitem__(self, position: int) -> Sample:
        """Return the sample at `position` of the stream, or raise BadSample."""
        number, index = self.locate_sample(position)
        return sample_at(self.sources[number], index, number)

    def locate_sample(self, position: int) -> tuple[int, int]:
        """Return the number of a source and the index in it at `position` of the stream.

        Every epoch has another order; each sample of a source is met once before any is met again.
        """
        epoch, place = divmod(position, self.epoch_samples)
        slot = _cached_shuffle(self.epoch_samples, f"{self.seed}/epoch {epoch}")(place)
        number = bisect_right(self._share_ends, slot)
        share, source = self._epoch_shares[number], self.sources[number]
        met = epoch * share + slot - (self._share_ends[number] - share)  # of this source, so far
        turn, rest = divmod(met, len(source))
        return number, self._source_order(source, f"{self.seed}/source {number}/pass {turn}")(rest)

    @staticmethod
    def _source_order(source: SampleSource, shuffle_key: str) -> Callable[[int], int]:
        """Return the order of a pass over a source: its own, if some orders are faster to read."""
        own = getattr(source, "pass_order", None)
        return own(shuffle_key) if own else _cached_shuffle(len(source), shuffle_key)
