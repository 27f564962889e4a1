"""The loader of optimizer steps: texts are planned ahead, and pixels follow row by row.

Two loaders in a chain. One process plans whole steps, which takes their texts alone; its plans name
the rows that the workers of the second loader open images for, in the order in which training takes
them. At any time there are PREFETCHED_ROWS rows per worker in memory, however large a step is: at
448 pixels a row of 16,384 tokens is 10 MB, so 8 workers have 160 MB in flight, and 8 ranks of a
node 1.3 GB. Order and content follow from the step's number and not from the number of workers.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Dataset

from vlbench.data.optimizer_step import LoadedRow, OptimizerStep, RowPlan, StepPlan, StepSource
from vlbench.distributed.launcher import isolate_data_worker

PREFETCHED_ROWS = 2  # per worker, ahead of training
PREFETCHED_PLANS = 2  # steps that are planned ahead: a step takes longer to train than to plan


@dataclass(kw_only=True, eq=False)
class StepLoader(Iterable[OptimizerStep]):
    """The steps with some numbers, in that order.

    A step has to be taken before the next one is asked for: its micro-batches are loaded on demand,
    and those that were not taken are dropped.

    Args:
        steps: the steps of the stage.
        step_numbers: which of them.
        num_workers: processes that load rows, beside one that plans steps; 0 for none.
        pin_memory: whether rows are copied to page-locked memory, for a GPU.
    """

    steps: StepSource
    step_numbers: Sequence[int]
    num_workers: int = 0
    pin_memory: bool = False

    def __len__(self) -> int:
        return len(self.step_numbers)

    def __iter__(self) -> Iterator[OptimizerStep]:
        planner_count = min(1, self.num_workers)
        plans = _load_items(
            _StepPlans(self.steps), self.step_numbers, planner_count, PREFETCHED_PLANS
        )
        plans, plans_of_rows = itertools.tee(plans)
        rows = _load_items(
            _LoadedRows(self.steps),
            (row for plan in plans_of_rows for row in plan.rows),
            self.num_workers,
            PREFETCHED_ROWS,
            self.pin_memory,
        )
        for plan in plans:
            planned_rows = deque(plan.rows)
            yield OptimizerStep(
                plan.index, [], plan.bad_samples, plan.skipped_samples, planned_rows, rows
            )
            for _ in planned_rows:
                next(rows)


def _load_items(
    dataset: Dataset[Any],
    indices: Iterable[Any],
    num_workers: int,
    prefetched_items: int,
    pin_memory: bool = False,
) -> Iterator[Any]:
    """Load the items of `dataset` with `indices`, which are asked for as workers get free."""
    return iter(
        DataLoader(
            dataset,
            sampler=indices,
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=prefetched_items if num_workers else None,
            worker_init_fn=isolate_data_worker,
            pin_memory=pin_memory,
        )
    )


@dataclass
class _StepPlans(Dataset[StepPlan]):
    """The plan of a step, by its number."""

    steps: StepSource

    def __getitem__(self, index: int) -> StepPlan:
        return self.steps.plan_step(index)


@dataclass
class _LoadedRows(Dataset[LoadedRow]):
    """A loaded row, by its plan."""

    steps: StepSource

    def __getitem__(self, row: RowPlan) -> LoadedRow:
        return self.steps.load_row(row)
