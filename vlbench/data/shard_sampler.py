"""The order of samples in shards: a pure function of (key, position) that reads few at a time.

A step's positions are dealt to lanes: position p belongs to lane p % lane_count. Every lane reads
its own shards window by window, and is shuffled inside a window. As a rank takes every
`world_size`-th position, no two ranks read the same shard wherever the world size divides the
number of lanes; the order does not depend on the number of ranks and workers. A lane that has no
more samples is passed over, and the others alternate on.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np

from vlbench.data.shuffle import FeistelShuffle

MAX_LANES = 128  # as many ranks as Yi-VL was trained on have shards of their own
KEPT_ORDERS = 4  # of a source: stages and passes that overlap
WINDOW_SHARDS = 4  # shards of a lane that are shuffled together and stay open
ORDER_VERSION = 2  # raised with every change of the order, in which no run can go on
Order = TypeVar("Order", bound=Callable[[int], int] | None)


class RecentOrders(Generic[Order]):
    """The orders of the last passes over a source, each made once."""

    def __init__(self) -> None:
        """Begin without any."""
        self._orders: dict[tuple[str, int], Order] = {}

    def find(self, shuffle_key: str, max_lanes: int, make: Callable[[], Order]) -> Order:
        """Return the order of a pass, made by `make` where it is not among the last ones."""
        key = (shuffle_key, max_lanes)
        if key not in self._orders:
            while len(self._orders) >= KEPT_ORDERS:
                del self._orders[next(iter(self._orders))]
            self._orders[key] = make()
        return self._orders[key]


class ShardShuffle:
    """A permutation of 0..total_samples-1, where samples are numbered shard by shard."""

    def __init__(
        self,
        sample_counts: Sequence[int],
        shuffle_key: str,
        window_shards: int = WINDOW_SHARDS,
        max_lanes: int = MAX_LANES,
    ) -> None:
        """Shuffle shards of `sample_counts` samples by `shuffle_key` and deal them to the lanes."""
        self.sample_counts = np.asarray(sample_counts, np.int64)
        self.shard_starts = np.concatenate([[0], np.cumsum(self.sample_counts)])
        self.total_samples = int(self.shard_starts[-1])
        self.shuffle_key, self.window_shards = shuffle_key, window_shards
        shuffle = FeistelShuffle(len(sample_counts), f"{shuffle_key}/shards")
        self.lane_count = 1
        while self.lane_count * 2 <= min(max_lanes, len(sample_counts)):
            self.lane_count *= 2
        dealt = np.fromiter(map(shuffle, range(len(sample_counts))), np.int64, len(sample_counts))
        self._lane_shards = [dealt[lane :: self.lane_count] for lane in range(self.lane_count)]
        self._lane_ends = [np.cumsum(self.sample_counts[shards]) for shards in self._lane_shards]
        # the lanes that have samples left alternate until the shortest of them ends, and so on
        lane_totals = np.array([int(ends[-1]) for ends in self._lane_ends])
        totals = np.unique(lane_totals)
        self._segment_lanes = [np.flatnonzero(lane_totals >= total) for total in totals]
        """The lanes that alternate in each segment."""
        self._lane_starts = np.concatenate([[0], totals[:-1]])
        """The position in each of them at which the segment begins."""
        lengths = (totals - self._lane_starts) * list(map(len, self._segment_lanes))
        self._segment_ends = np.cumsum(lengths)

    def __call__(self, position: int) -> int:
        """Return the index at `position`, both in 0..total_samples-1."""
        if not 0 <= position < self.total_samples:
            raise IndexError(f"position {position} of a permutation of {self.total_samples}")
        segment = bisect_right(self._segment_ends, position)
        rest = position - (int(self._segment_ends[segment - 1]) if segment else 0)
        lanes = self._segment_lanes[segment]
        lane_position = int(self._lane_starts[segment]) + rest // len(lanes)
        return self._index_in_lane(int(lanes[rest % len(lanes)]), lane_position)

    def _index_in_lane(self, lane: int, lane_position: int) -> int:
        """Return the index of the sample at `lane_position` of a lane."""
        shards, ends = self._lane_shards[lane], self._lane_ends[lane]
        first = bisect_right(ends, lane_position) // self.window_shards * self.window_shards
        window_start = int(ends[first - 1]) if first else 0
        last = min(first + self.window_shards, len(shards)) - 1
        window_size = int(ends[last]) - window_start
        window_key = f"{self.shuffle_key}/lane {lane}/window {first}"
        window_shuffle = FeistelShuffle(window_size, window_key)
        shuffled = window_start + window_shuffle(lane_position - window_start)
        shard = bisect_right(ends, shuffled)
        shard_start = int(ends[shard - 1]) if shard else 0
        return int(self.shard_starts[shards[shard]]) + shuffled - shard_start
