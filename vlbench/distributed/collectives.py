"""The processes that train one model together: who this one is, and what all of them know.

Without a process group there is one process, and everything here is trivial. What is exchanged are
a few numbers between steps, which travel over the processors, and rows of tensors (`gather`,
`fetch`), which travel from where they are.
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


def is_distributed() -> bool:
    """Tell whether there are other processes."""
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """Return the number of this process, from 0."""
    return distributed.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return how many processes there are."""
    return distributed.get_world_size() if is_distributed() else 1


def is_rank_zero() -> bool:
    """Tell whether this is the process that writes and speaks for all."""
    return rank() == 0


def all_gather_numbers(values: Sequence[float]) -> Tensor:
    """Return the numbers of every process, float64 `[processes, values]`."""
    mine = torch.tensor(values, dtype=torch.float64)
    if not is_distributed():
        return mine[None]
    rows = [torch.empty_like(mine) for _ in range(world_size())]
    distributed.all_gather(rows, mine)
    return torch.stack(rows)


def all_gather_objects(value: T) -> list[T]:
    """Return what every process has, in their order."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def call_on_all_ranks(function: Callable[[], T]) -> T:
    """Call something in every process; where it fails in any, all end and one says why."""
    if not is_distributed():
        return function()
    result, failure = None, None
    try:
        result = function()
    except Exception as error:
        failure = error
    failed = [number for number, bad in enumerate(all_gather_objects(failure is not None)) if bad]
    if failed:
        raise (failure if failure and rank() == failed[0] else SystemExit(1))
    return result  # type: ignore[return-value]


def call_on_rank_zero(function: Callable[[], T]) -> T:
    """Let the first process call something, and return its result in all of them."""
    value = call_on_all_ranks(lambda: function() if is_rank_zero() else None)
    return all_gather_objects(value)[0]  # type: ignore[return-value]


def error_for_rank(error: UserError) -> BaseException:
    """Return what to raise for a mistake that all processes have found: one of them tells it."""
    return error if is_rank_zero() else SystemExit(2)


def gather_full_tensor(tensor: Tensor) -> Tensor:
    """Return all of a tensor that is sharded over the processes; every process has to call it."""
    full: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)  # of a DTensor
    return full() if full else tensor


def all_gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Return the rows of all processes in their order, and where this one's begin.

    Processes may have different numbers of rows. Those of others carry no gradient.
    """
    if not is_distributed():
        return rows, 0
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(world_size())]
    distributed.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    sizes = [int(count) for count in counts]
    room = [0, 0] * (rows.dim() - 1) + [0, max(sizes) - len(rows)]
    padded = pad(rows.detach(), room).contiguous()
    everyone = [torch.empty_like(padded) for _ in range(world_size())]
    distributed.all_gather(everyone, padded)
    kept = [part[:count] for part, count in zip(everyone, sizes, strict=True)]
    kept[rank()] = rows
    return torch.cat(kept), sum(sizes[: rank()])


def fetch_rows(rows: Sequence[Tensor], row_indices: Sequence[int], empty_rows: Tensor) -> Tensor:
    """Return `[wanted, ...]`, any rows of any processes, numbered process by process.

    `rows` are those of this process, `none` an empty tensor with their shape and type on the device
    of the result. Every process has to call it, also if it wants none. No row carries a gradient.
    """
    if not is_distributed():
        return select_rows(rows, row_indices, empty_rows)
    ends = list(accumulate(int(count) for count in all_gather_numbers([len(rows)])[:, 0]))
    owners = [bisect_right(ends, number) for number in row_indices]
    asked: list[list[int]] = [[] for _ in ends]
    for number, owner in zip(row_indices, owners, strict=True):
        asked[owner].append(number - (ends[owner - 1] if owner else 0))
    asks = all_gather_objects(asked)  # by who wants it, then by who has it
    mine = [number for theirs in asks for number in theirs[rank()]]
    received = empty_rows.new_empty(len(row_indices), *empty_rows.shape[1:])
    distributed.all_to_all_single(
        received,
        select_rows(rows, mine, empty_rows).detach(),
        [len(some) for some in asked],
        [len(theirs[rank()]) for theirs in asks],
    )
    came = sorted(range(len(row_indices)), key=owners.__getitem__)  # grouped by owner
    place = torch.tensor(came, dtype=torch.long).argsort()
    return received[place.to(received.device)]


def select_rows(rows: Sequence[Tensor], row_indices: Sequence[int], empty_rows: Tensor) -> Tensor:
    """Return `[wanted, ...]` of a process' own rows, on the device of the empty tensor `none`."""
    return (
        torch.stack([rows[number] for number in row_indices]).to(empty_rows.device)
        if row_indices
        else empty_rows
    )
