"""The order of samples: a pure function of (seed, position), without an index list or state."""

from __future__ import annotations

import functools
import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeVar

from vlbench.data.sample import Sample, SampleSource, sample_at
from vlbench.data.source_interleave import SourceInterleave
from vlbench.errors import UserError

ItemT = TypeVar("ItemT")

MIXED_LANES = 8  # of shards in a mixture, where no rank has lanes of its own
_FEISTEL_ROUNDS = 6
_UINT64_MASK = (1 << 64) - 1


class FeistelShuffle:
    """A pseudorandom permutation of 0..count-1 in constant memory, for 10^8 samples and more.

    A Feistel network (a bijection on a power of four) keyed by the seed; a value of `count` or more
    is permuted again until it is below `count`, which gives a bijection on 0..count-1.
    """

    def __init__(self, count: int, seed: int | str) -> None:
        """Key the permutation of `count` items; a seed gives the same order on every machine."""
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
            raise IndexError(f"position {position} of a permutation of {self.count}")
        value = self._permute_once(position)
        while value >= self.count:
            value = self._permute_once(value)
        return value

    def position_of(self, index: int) -> int:
        """Return the position at which `index` is, both in 0..count-1."""
        if not 0 <= index < self.count:
            raise IndexError(f"index {index} of a permutation of {self.count}")
        value = self._reverse_once(index)
        while value >= self.count:
            value = self._reverse_once(value)
        return value

    def _reverse_once(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._half_mask
        for key in reversed(self._round_keys):
            left, right = right ^ (_mix_bits(left ^ key) & self._half_mask), left
        return left << self._half_bits | right

    def _permute_once(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._half_mask
        for key in self._round_keys:
            left, right = right, left ^ (_mix_bits(right ^ key) & self._half_mask)
        return left << self._half_bits | right


def _mix_bits(value: int) -> int:
    """Mix 64 bits (the finalizer of SplitMix64)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _UINT64_MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _UINT64_MASK
    return value ^ value >> 31


@functools.lru_cache(maxsize=256)
def cached_shuffle(count: int, seed: str) -> FeistelShuffle:
    """Return a permutation, which is kept for its next use."""
    return FeistelShuffle(count, seed)


def pick_fixed_subset(items: Sequence[ItemT], count: int | None) -> list[ItemT]:
    """Return `count` items from all over the list, always the same ones; all items for None."""
    if count is None or count >= len(items):
        return list(items)
    draw = FeistelShuffle(len(items), "spread")
    return [items[draw(number)] for number in range(count)]


class SourceMixture:
    """Several sources shuffled into one endless stream of samples.

    A source's weight is how often each of its samples occurs per epoch: 2 is twice; 0.5 is half of
    them, and the other half in the next epoch.
    """

    def __init__(self, sources: Sequence[tuple[SampleSource, float]], seed: int) -> None:
        """Mix (source, weight) pairs. Raises a UserError for an empty source or a bad weight."""
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
        self.epoch_shares = [max(1, round(len(source) * weight)) for source, weight in sources]
        """How many samples an epoch takes of each source."""
        self._share_ends = list(accumulate(self.epoch_shares))
        self.epoch_samples = self._share_ends[-1]
        """Samples per epoch."""
        has_blocks = any(getattr(source, "block_counts", None) is not None for source, _ in sources)
        self._interleave = SourceInterleave(self.epoch_shares, seed) if has_blocks else None

    def __len__(self) -> int:
        return self.epoch_samples

    def __getitem__(self, position: int) -> Sample:
        """Return the sample at `position` of the stream, or raise BadSample."""
        source_index, index, pass_number = self._locate_in_pass(position)
        return sample_at(self.sources[source_index], index, source_index, pass_number)

    def locate_sample(self, position: int) -> tuple[int, int]:
        """Return the index of a source, and the index in it, at `position` of the stream.

        Every epoch has another order; each sample of a source occurs once before any occurs again.
        """
        return self._locate_in_pass(position)[:2]

    def _locate_in_pass(self, position: int) -> tuple[int, int, int]:
        """Return what `locate_sample` does, and how often all of the source has occurred before."""
        epoch, epoch_position = divmod(position, self.epoch_samples)
        source_index, drawn_in_epoch = self._locate_in_epoch(epoch, epoch_position)
        source = self.sources[source_index]
        drawn = epoch * self.epoch_shares[source_index] + drawn_in_epoch
        pass_number, pass_position = divmod(drawn, len(source))
        shuffle_key = f"{self.seed}/source {source_index}/pass {pass_number}"
        return source_index, self._pass_order(source, shuffle_key)(pass_position), pass_number

    def _locate_in_epoch(self, epoch: int, epoch_position: int) -> tuple[int, int]:
        """Return the index of a source, and how many of its samples the epoch has drawn before."""
        if self._interleave:
            return self._interleave.locate(epoch, epoch_position)
        slot = cached_shuffle(self.epoch_samples, f"{self.seed}/epoch {epoch}")(epoch_position)
        source_index = bisect_right(self._share_ends, slot)
        share_start = self._share_ends[source_index] - self.epoch_shares[source_index]
        return source_index, slot - share_start

    def _pass_order(self, source: SampleSource, shuffle_key: str) -> Callable[[int], int]:
        """Return the order of one pass over a source: its own where it has one, as shards do."""
        own_order: Callable[..., Callable[[int], int] | None] | None
        own_order = getattr(source, "pass_order", None)
        lanes = {} if len(self.sources) == 1 else {"max_lanes": MIXED_LANES}
        order = own_order(shuffle_key, **lanes) if own_order else None
        return order or cached_shuffle(len(source), shuffle_key)


class SourceTail(SourceMixture):
    """The samples of one source from number `start` on, shuffled; each once in an epoch."""

    def __init__(self, source: SampleSource, start: int, seed: int) -> None:
        """Leave out the samples before `start` (from 0), fewer than the source has."""
        super().__init__([(source, 1.0)], seed)
        self.start = start
        self.epoch_samples = len(source) - start

    def _locate_in_pass(self, position: int) -> tuple[int, int, int]:
        """Return 0, the only source, the index in it at `position` of the stream, and the epoch."""
        epoch, epoch_position = divmod(position, self.epoch_samples)
        order = cached_shuffle(self.epoch_samples, f"{self.seed}/tail {self.start}/{epoch}")
        return 0, self.start + order(epoch_position), epoch
