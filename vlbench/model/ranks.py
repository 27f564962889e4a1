"""What a connector needs of other processes: the rows of a tensor from all of them."""

from __future__ import annotations

import torch
from torch import Tensor, distributed
from torch.nn.functional import pad


def gather(rows: Tensor) -> tuple[Tensor, int]:
    """Return the rows of all processes in their order, and where this one's begin.

    Processes may have different numbers of rows. Those of others carry no gradient.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return rows, 0
    world, rank = distributed.get_world_size(), distributed.get_rank()
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(world)]
    distributed.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    sizes = [int(count) for count in counts]
    room = [0, 0] * (rows.dim() - 1) + [0, max(sizes) - len(rows)]
    padded = pad(rows.detach(), room).contiguous()
    everyone = [torch.empty_like(padded) for _ in range(world)]
    distributed.all_gather(everyone, padded)
    kept = [part[:size] for part, size in zip(everyone, sizes, strict=True)]
    kept[rank] = rows
    return torch.cat(kept), sum(sizes[:rank])
