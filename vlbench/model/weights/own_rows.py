"""Which part of every tensor this process writes, where several train one model.

Sharded rows are written by who has them. What several processes have (replicas, and what is not
sharded) they divide among themselves, so all write about the same number of bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from vlbench.distributed import collectives

MIN_DIVIDED_BYTES = 1 << 20  # smaller tensors are written by one process


class OwnRows(NamedTuple):
    """Consecutive elements of a flattened tensor, which this process writes."""

    values: Tensor
    """One-dimensional, on the device where they are."""
    first_element: int
    """Their place in the whole tensor."""


def find_own_rows(tensors: Mapping[str, Tensor]) -> dict[str, OwnRows]:
    """Return what this process writes of each tensor; every process has to call it.

    Rows are views of the tensors: nothing is copied or sent, but for tensors that are sharded
    otherwise than by rows, which are gathered.
    """
    own_rows = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        local, first_row, holder, holder_count = _find_local_rows(tensor.detach())
        row_size = math.prod(local.shape[1:])
        begin, end = _share_of(local, number, holder, holder_count)
        if begin < end:
            values = local.contiguous().view(-1)[begin:end]
            own_rows[name] = OwnRows(values, first_row * row_size + begin)
    return own_rows


def _share_of(local: Tensor, number: int, holder: int, holder_count: int) -> tuple[int, int]:
    """Return the elements, from and to, that one of the processes with the same rows writes."""
    if local.nbytes >= MIN_DIVIDED_BYTES:
        return (
            local.numel() * holder // holder_count,
            local.numel() * (holder + 1) // holder_count,
        )
    return (0, local.numel() if number % holder_count == holder else 0)


def _find_local_rows(tensor: Tensor) -> tuple[Tensor, int, int, int]:
    """Return the rows of this process, the first one's index, and who else has them.

    The latter are two numbers: the index of this process among those with the same rows, and how
    many there are.
    """
    if not isinstance(tensor, DTensor):
        return tensor, 0, collectives.rank(), collectives.world_size()
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    placements: tuple[Placement, ...] = tensor.placements
    sharded_dims = [i for i, one in enumerate(placements) if not isinstance(one, Replicate)]
    if len(sharded_dims) > 1 or any(type(placements[i]) is not Shard for i in sharded_dims):
        return tensor.full_tensor(), 0, collectives.rank(), collectives.world_size()
    holder, holder_count = 0, 1
    for dim, index in enumerate(coordinate):
        if dim not in sharded_dims:
            size = tensor.device_mesh.size(dim)
            holder, holder_count = holder * size + index, holder_count * size
    first_row = 0
    if sharded_dims:
        placement = placements[sharded_dims[0]]
        assert isinstance(placement, Shard)
        if placement.dim != 0:
            return tensor.full_tensor(), 0, collectives.rank(), collectives.world_size()
        shard_count = tensor.device_mesh.size(sharded_dims[0])
        rows_per_shard = -(-tensor.shape[0] // shard_count)  # as torch.chunk divides them
        first_row = min(tensor.shape[0], rows_per_shard * coordinate[sharded_dims[0]])
    return tensor.to_local(), first_row, holder, holder_count
