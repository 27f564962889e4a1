"""One rank's part of an optimizer step: planned from texts, its micro-batches loaded one by one.

A step is known before any of its images is opened: its samples are tokenised, and packed into rows
(`StepPlan`). So every process knows ahead how many micro-batches it has and how many tokens the
loss is averaged over, and nobody has to keep the pixels of a step, which at 448 pixels and 4,096
samples are gigabytes. A loader's item is one row (`LoadedRow`), a micro-batch.

An image that cannot be opened is found out on loading alone. Its sample is left out of its row,
which keeps its place; what was counted ahead is then too much, and `OptimizerStep.counts` tells
what is left once all rows are taken.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from vlbench.data.filler_batches import empty_batch
from vlbench.data.packing import PackedBatch
from vlbench.errors import BadSample


class RowPlan(NamedTuple):
    """A packed row before its images are opened: small enough to be sent to any worker."""

    stream_index: list[int]
    """The positions of its samples in the stream of the stage."""
    sample_lengths: list[int]
    image_count: int
    view_count: int
    """What the vision encoder sees: as many as images, unless they are tiled."""
    supervised_token_count: int
    truncated_samples: int = 0
    lost_supervised_tokens: int = 0
    reduced_samples: int = 0


@dataclass
class StepPlan:
    """One rank's part of an optimizer step, as its texts tell it."""

    index: int
    rows: list[RowPlan] = field(default_factory=list)
    """A micro-batch each; empty when every sample is bad."""
    bad_samples: list[BadSample] = field(default_factory=list)
    """Samples that are left out, with the reason."""
    skipped_samples: int = 0
    """Samples without an image in a caption stage."""

    @property
    def token_count(self) -> int:
        """Positions of its rows, without padding."""
        return sum(sum(row.sample_lengths) for row in self.rows)


@dataclass
class LoadedRow:
    """A row with its pixels."""

    batch: PackedBatch | None
    """None when no sample of the row can be used."""
    bad_samples: list[BadSample] = field(default_factory=list)
    """Samples that are left out because an image cannot be opened."""

    def pin_memory(self) -> LoadedRow:
        """Return the row with its batch in page-locked memory."""
        return replace(self, batch=self.batch.pin_memory() if self.batch else None)


class StepSource(Protocol):
    """The optimizer steps of a stage as one rank computes them."""

    def __len__(self) -> int: ...

    def plan_step(self, index: int) -> StepPlan:
        """Return step `index` without opening an image."""
        ...

    def load_row(self, row: RowPlan) -> LoadedRow:
        """Return a row of a planned step with its pixels."""
        ...


class StepCounts(NamedTuple):
    """Sizes of a step."""

    micro_batches: int
    supervised_tokens: int
    tokens: int
    """Positions without padding."""
    images: int
    views: int
    """What the vision encoder sees: as many as images, unless they are tiled."""
    samples: int
    truncated_samples: int = 0
    """Samples whose end was cut off at `language.max_length`."""
    lost_supervised_tokens: int = 0
    """Supervised tokens of these ends."""
    reduced_samples: int = 0
    """Samples with fewer tiles than they could have, for `vision.max_visual_tokens`."""


@dataclass
class OptimizerStep:
    """What one rank computes in one optimizer step."""

    index: int
    micro_batches: list[PackedBatch] = field(default_factory=list)
    """Those that are loaded. Of those that were taken as they were loaded, the tensors are gone."""
    bad_samples: list[BadSample] = field(default_factory=list)
    """Samples that are left out, with the reason."""
    skipped_samples: int = 0
    """Samples without an image in a caption stage."""
    planned_rows: deque[RowPlan] = field(default_factory=deque)
    """Rows that are not loaded yet."""
    loaded_rows: Iterator[LoadedRow] = field(default_factory=lambda: iter(()))
    """Yields them."""

    @property
    def counts(self) -> StepCounts:
        """The sizes of what is loaded and of what is planned."""
        batches, rows = self.micro_batches, self.planned_rows
        return StepCounts(
            len(batches) + len(rows),
            sum(batch.supervised_token_count for batch in batches)
            + sum(row.supervised_token_count for row in rows),
            sum(sum(map(sum, batch.sample_lengths)) for batch in batches)
            + sum(sum(row.sample_lengths) for row in rows),
            sum(batch.image_count for batch in batches) + sum(row.image_count for row in rows),
            sum(batch.view_count for batch in batches) + sum(row.view_count for row in rows),
            sum(len(batch.sample_ids) for batch in batches)
            + sum(len(row.stream_index) for row in rows),
            *(
                sum(getattr(each, name) for each in (*batches, *rows))
                for name in ("truncated_samples", "lost_supervised_tokens", "reduced_samples")
            ),
        )

    def take_micro_batches(self) -> Iterator[PackedBatch]:
        """Yield the micro-batches; of those that are loaded on the way no pixels are kept.

        A row of which every sample is bad gives an empty batch, as the number of micro-batches was
        agreed on with the other processes.
        """
        yield from tuple(self.micro_batches)
        for batch in self._load_planned_rows():
            if batch is not None:
                self.micro_batches.append(batch.without_tensors())
            yield batch or empty_batch()

    def load_micro_batches(self) -> None:
        """Load all micro-batches, for losses that need the whole step before the first of them."""
        self.micro_batches += [batch for batch in self._load_planned_rows() if batch is not None]

    def _load_planned_rows(self) -> Iterator[PackedBatch | None]:
        while self.planned_rows:
            row = next(self.loaded_rows)
            self.planned_rows.popleft()
            self.bad_samples += row.bad_samples
            yield row.batch
