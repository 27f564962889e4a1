"""A fixed part of a source by index arithmetic: 50,000 of 10^8 samples without a list of them.

A source that is read block by block (shards, row groups of Parquet files) gives of a random choice
the same share of every block, so that what is chosen is still read block by block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlbench.data.shuffle import cached_shuffle


class RecordChoice:
    """A mapping of 0..count-1 to different numbers below the sum of `block_counts`."""

    def __init__(
        self, block_counts: Sequence[int], order: str, count: int, choice_key: str
    ) -> None:
        """Choose `count` records of blocks: the first, the last, or random ones by `choice_key`."""
        self._block_sizes = np.asarray(block_counts, np.int64)
        self._block_ends = np.cumsum(self._block_sizes)
        total = int(self._block_ends[-1])
        assert 0 < count <= total, f"{count} of {total} records"
        self.order, self.count, self._choice_key = order, count, choice_key
        if order == "random":
            # products of 10^8 records and as many chosen ones stay below 2^63
            chosen_ends = self._block_ends * count // total
        elif order == "first":
            chosen_ends = np.minimum(self._block_ends, count)
        else:
            chosen_ends = np.maximum(self._block_ends - (total - count), 0)
        self._chosen_ends = chosen_ends
        self.block_counts: Sequence[int] = np.diff(chosen_ends, prepend=0).tolist()
        """How many records of each block are chosen."""

    def __len__(self) -> int:
        return self.count

    def __call__(self, index: int) -> int:
        """Return the record that is number `index` (from 0) of the chosen ones."""
        if not 0 <= index < self.count:
            raise IndexError(f"record {index} of {self.count} chosen ones")
        if self.order == "first":
            return index
        if self.order == "end":
            return int(self._block_ends[-1]) - self.count + index
        block = int(self._chosen_ends.searchsorted(index, side="right"))
        size = int(self._block_sizes[block])
        in_block = index - int(self._chosen_ends[block]) + int(self.block_counts[block])
        shuffle = cached_shuffle(size, f"{self._choice_key}/block {block}")
        return int(self._block_ends[block]) - size + shuffle(in_block)

    def find(self, record: int) -> int | None:
        """Return which number a record (from 0) has among the chosen ones, None if it is none."""
        if self.order != "random":
            index = record - (
                0 if self.order == "first" else int(self._block_ends[-1]) - self.count
            )
            return index if 0 <= index < self.count else None
        block = int(self._block_ends.searchsorted(record, side="right"))
        size, chosen = int(self._block_sizes[block]), int(self.block_counts[block])
        shuffle = cached_shuffle(size, f"{self._choice_key}/block {block}")
        in_block = shuffle.position_of(record - int(self._block_ends[block]) + size)
        return int(self._chosen_ends[block]) - chosen + in_block if in_block < chosen else None
