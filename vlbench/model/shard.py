"""What is a unit of sharding (FSDP2): decoder layers, tower blocks, blocks of the connector.

A unit gathers its parameters when its `forward` is called, on every process in the same order. What
belongs to none (embeddings, head, the rest of a connector) is gathered once for the whole step, so
`inject`, `losses` and `objective` may read it, and connectors need no care for sharding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from vlbench.model.vlm import VLM


def shard(vlm: VLM, mesh: DeviceMesh, **options: Any) -> VLM:
    """Shard a model over the processes of `mesh`; `options` are those of `fully_shard`."""
    for unit in units(vlm):
        fully_shard(unit, mesh=mesh, **options)
    fully_shard(vlm, mesh=mesh, **options)
    return vlm


@contextlib.contextmanager
def gathered(vlm: VLM) -> Iterator[None]:
    """Have the connector's parameters whole for a moment; every process has to do it."""
    sharded = [m for m in (vlm, *vlm.connector.modules()) if isinstance(m, FSDPModule)]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


def units(vlm: VLM) -> Iterator[nn.Module]:
    """Give the blocks of all parts; those of a connector are what its lists of modules hold."""
    yield from vlm.language.model.layers
    yield from vlm.vision.blocks()
    for module in vlm.connector.children():
        if isinstance(module, nn.ModuleDict):
            yield from module.values()
        elif isinstance(module, nn.ModuleList):
            yield from module
