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

from vlbench.data.order import Order

LANES = 128  # at most: as many ranks as Yi-VL was trained on have shards of their own
WINDOW = 4  # shards of a lane that are read together: what is shuffled, and stays open


class Lanes:
    """An order of 0..total-1 over shards of `counts` samples, numbered shard by shard."""

    def __init__(self, counts: Sequence[int], key: str, window: int = WINDOW) -> None:
        """Shuffle the shards by `key`, deal them to the lanes, and cut the lanes into windows."""
        self.counts = np.asarray(counts, np.int64)
        self.begins = np.concatenate([[0], np.cumsum(self.counts)])
        self.total, self.key, self.window = int(self.begins[-1]), key, window
        shuffle = Order(len(counts), f"{key}/shards")
        self.lanes = 1
        while self.lanes * 2 <= min(LANES, len(counts)):
            self.lanes *= 2
        dealt = np.fromiter(map(shuffle, range(len(counts))), np.int64, len(counts))
        self._shards = [dealt[lane :: self.lanes] for lane in range(self.lanes)]
        self._ends = [np.cumsum(self.counts[shards]) for shards in self._shards]
        # every lane gives this many samples in turn; what longer lanes have left comes at the end
        self._even = int(min(ends[-1] for ends in self._ends))
        left = [int(ends[-1]) - self._even for ends in self._ends]
        self._left = np.cumsum(left)

    def __call__(self, position: int) -> int:
        """Return the index at `position`, both in 0..total-1."""
        if not 0 <= position < self.total:
            raise IndexError(f"position {position} of an order of {self.total}")
        even = self._even * self.lanes
        if position < even:
            return self._in_lane(position % self.lanes, position // self.lanes)
        rest = position - even
        lane = bisect_right(self._left, rest)
        before = int(self._left[lane - 1]) if lane else 0
        return self._in_lane(lane, self._even + rest - before)

    def _in_lane(self, lane: int, place: int) -> int:
        """Return the index of the sample at `place` of a lane."""
        shards, ends = self._shards[lane], self._ends[lane]
        first = bisect_right(ends, place) // self.window * self.window
        begin = int(ends[first - 1]) if first else 0
        last = min(first + self.window, len(shards)) - 1
        size = int(ends[last]) - begin
        name = f"{self.key}/lane {lane}/window {first}"
        inside = begin + Order(size, name)(place - begin)
        shard = bisect_right(ends, inside)
        before = int(ends[shard - 1]) if shard else 0
        return int(self.begins[shards[shard]]) + inside - before
