"""Rank, world size and collective operations; without a process group there is one rank.

Numbers and objects are exchanged between CPUs (gloo), rows of tensors on the device they are on.
What `call_*` does in one rank or in all may take hours, as a download: ranks that are done wait in
`call_group`, whose limit is longer than that of a training step.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.nn.functional import pad

from vlbench.errors import UserError

T = TypeVar("T")
call_group: distributed.ProcessGroup | None = None
"""The group in which ranks wait for each other's calls; None: the group of everything else."""


def is_distributed() -> bool:
    """Tell whether there is a process group, so other processes."""
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """Return the rank of this process, from 0."""
    return distributed.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return how many processes there are."""
    return distributed.get_world_size() if is_distributed() else 1


def is_rank_zero() -> bool:
    """Tell whether this is the process that writes files and prints for all."""
    return rank() == 0


def all_gather_numbers(values: Sequence[float]) -> Tensor:
    """Return the numbers of every rank, float64 `[ranks, values]`."""
    own_row = torch.tensor(values, dtype=torch.float64)
    if not is_distributed():
        return own_row[None]
    rows = [torch.empty_like(own_row) for _ in range(world_size())]
    distributed.all_gather(rows, own_row)
    return torch.stack(rows)


def all_gather_objects(value: T, group: distributed.ProcessGroup | None = None) -> list[T]:
    """Return the objects of every rank, in the order of ranks; `group` has all of them."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value, group)
    return values


def call_on_all_ranks(function: Callable[[], T]) -> T:
    """Call a function in every rank; if it fails in any, all ranks end and one raises the error."""
    if not is_distributed():
        return function()
    results: list[T] = []
    failure = None
    try:
        results.append(function())
    except Exception as error:
        failure = error
    has_failed = all_gather_objects(failure is not None, call_group)
    if any(has_failed):
        first_failed = has_failed.index(True)
        raise (failure if failure and rank() == first_failed else SystemExit(1))
    return results[0]


def call_on_rank_zero(function: Callable[[], T]) -> T:
    """Call a function in the first rank, and return its result in all of them."""
    results = call_on_all_ranks(lambda: [function()] if is_rank_zero() else [])
    return all_gather_objects(results)[0][0]


def call_on_rank_zero_first(function: Callable[[], T]) -> T:
    """Call a function in every rank, in the others when the first has returned from it.

    They find what it keeps in files: an index of records, a download.
    """
    results = call_on_all_ranks(lambda: [function()] if is_rank_zero() else [])
    return call_on_all_ranks(lambda: results[0] if results else function())


def error_for_rank(error: UserError) -> BaseException:
    """Return what to raise for an error that all ranks have found: only the first one prints it."""
    return error if is_rank_zero() else SystemExit(2)


def gather_full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be sharded (a DTensor); every rank has to call it."""
    full_tensor: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return full_tensor() if full_tensor else tensor


def all_gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Return the rows of all ranks in their order, and the index of this rank's first row.

    Ranks may have different numbers of rows. Those of others carry no gradient.
    """
    if not is_distributed():
        return rows, 0
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(world_size())]
    distributed.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    sizes = [int(count) for count in counts]
    padding = [0, 0] * (rows.dim() - 1) + [0, max(sizes) - len(rows)]
    padded = pad(rows.detach(), padding).contiguous()
    gathered = [torch.empty_like(padded) for _ in range(world_size())]
    distributed.all_gather(gathered, padded)
    rank_rows = [part[:count] for part, count in zip(gathered, sizes, strict=True)]
    rank_rows[rank()] = rows
    return torch.cat(rank_rows), sum(sizes[: rank()])


def fetch_rows(rows: Sequence[Tensor], row_indices: Sequence[int], empty_rows: Tensor) -> Tensor:
    """Return any rows of any ranks, `[requested rows, ...]`, without gradient.

    Every rank has to call it, also if it requests none.

    Args:
        rows: The rows of this rank.
        row_indices: The requested rows, counted through the rows of all ranks.
        empty_rows: A tensor without rows, of the shape, dtype and device of the result.

    """
    if not is_distributed():
        return select_rows(rows, row_indices, empty_rows)
    ends = list(accumulate(int(count) for count in all_gather_numbers([len(rows)])[:, 0]))
    owners = [bisect_right(ends, index) for index in row_indices]
    requests: list[list[int]] = [[] for _ in ends]
    for index, owner in zip(row_indices, owners, strict=True):
        requests[owner].append(index - (ends[owner - 1] if owner else 0))
    all_requests = all_gather_objects(requests)  # by requesting rank, then by owner
    rows_to_send = [index for by_owner in all_requests for index in by_owner[rank()]]
    received = empty_rows.new_empty(len(row_indices), *empty_rows.shape[1:])
    distributed.all_to_all_single(
        received,
        select_rows(rows, rows_to_send, empty_rows).detach(),
        [len(indices) for indices in requests],
        [len(by_owner[rank()]) for by_owner in all_requests],
    )
    received_order = sorted(range(len(row_indices)), key=owners.__getitem__)  # grouped by owner
    requested_order = torch.tensor(received_order, dtype=torch.long).argsort()
    return received[requested_order.to(received.device)]


def select_rows(rows: Sequence[Tensor], row_indices: Sequence[int], empty_rows: Tensor) -> Tensor:
    """Return `[requested rows, ...]` of this rank, on the device of `empty_rows`."""
    return (
        torch.stack([rows[index] for index in row_indices]).to(empty_rows.device)
        if row_indices
        else empty_rows
    )
