"""The order of samples in shards: a pure function of (key, position) that reads shards in turn.

A step's positions go around LANES: position p belongs to lane p % lanes. Every lane reads its own
shards one window after the other and shuffles inside of the window. As a rank takes every world-th
position, the shards are divided among ranks wherever the world divides the lanes, and the order is
the same for every number of ranks and workers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from vlbench.data.shuffle import FeistelShuffle

MAX_LANES = 128  # at most: as many ranks as Yi-VL was trained on have shards of their own
WINDOW_SHARDS = 4  # shards of a lane that are read together: what is shuffled, and stays open


class ShardShuffle:
    """An order of 0..total-1 over shards of `counts` samples, numbered shard by shard."""

    def __init__(
        self, sample_counts: Sequence[int], shuffle_key: str, window_shards: int = WINDOW_SHARDS
    ) -> None:
        """Shuffle the shards by `key`, deal them to the lanes, and cut the lanes into windows."""
        self.sample_counts = np.asarray(sample_counts, np.int64)
        self.shard_starts = np.concatenate([[0], np.cumsum(self.sample_counts)])
        self.total_samples, self.shuffle_key, self.window_shards = (
            int(self.shard_starts[-1]),
            shuffle_key,
            window_shards,
        )
        shuffle = FeistelShuffle(len(sample_counts), f"{shuffle_key}/shards")
        self.lane_count = 1
        while self.lane_count * 2 <= min(MAX_LANES, len(sample_counts)):
            self.lane_count *= 2
        dealt = np.fromiter(map(shuffle, range(len(sample_counts))), np.int64, len(sample_counts))
        self._lane_shards = [dealt[lane :: self.lane_count] for lane in range(self.lane_count)]
        self._lane_ends = [np.cumsum(self.sample_counts[shards]) for shards in self._lane_shards]
        # every lane gives this many samples in turn; what longer lanes have left comes at the end
        self._common_length = int(min(ends[-1] for ends in self._lane_ends))
        left = [int(ends[-1]) - self._common_length for ends in self._lane_ends]
        self._remainder_ends = np.cumsum(left)

    def __call__(self, position: int) -> int:
        """Return the index at `position`, both in 0..total-1."""
        if not 0 <= position < self.total_samples:
            raise IndexError(f"position {position} of an order of {self.total_samples}")
        even = self._common_length * self.lane_count
        if position < even:
            return self._index_in_lane(position % self.lane_count, position // self.lane_count)
        rest = position - even
        lane = bisect_right(self._remainder_ends, rest)
        before = int(self._remainder_ends[lane - 1]) if lane else 0
        return self._index_in_lane(lane, self._common_length + rest - before)

    def _index_in_lane(self, lane: int, lane_position: int) -> int:
        """Return the index of the sample at `place` of a lane."""
        shards, ends = self._lane_shards[lane], self._lane_ends[lane]
        first = bisect_right(ends, lane_position) // self.window_shards * self.window_shards
        begin = int(ends[first - 1]) if first else 0
        last = min(first + self.window_shards, len(shards)) - 1
        size = int(ends[last]) - begin
        name = f"{self.shuffle_key}/lane {lane}/window {first}"
        inside = begin + FeistelShuffle(size, name)(lane_position - begin)
        shard = bisect_right(ends, inside)
        before = int(ends[shard - 1]) if shard else 0
        return int(self.shard_starts[shards[shard]]) + inside - before
