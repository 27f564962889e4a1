"""What is a unit of sharding (FSDP2): decoder layers, tower blocks, blocks of the connector.

A unit gathers its parameters when its `forward` is called, on every process in the same order. What
belongs to none (embeddings, head, the rest of a connector) is gathered once for the whole step, so
`inject`, `losses` and `objective` may read it, and connectors need no care for sharding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from vlbench.model.vlm import VLM


def shard(vlm: VLM, mesh: DeviceMesh, half: bool = False) -> VLM:
    """Shard a model over the processes of `mesh`.

    With `half` the blocks of tower and language model travel in bfloat16, as which autocast would
    multiply them; gradients are summed in float32, and the rest stays as it is.
    """
    kind = torch.bfloat16 if half else None
    sent = MixedPrecisionPolicy(kind, kind and torch.float32, cast_forward_inputs=False)
    whole = {id(module) for module in vlm.connector.modules()}
    for unit in units(vlm):
        policy = MixedPrecisionPolicy() if id(unit) in whole else sent
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(vlm, mesh=mesh)
    if any(parameter.dtype.itemsize < 4 for parameter in vlm.parameters()):
        vlm.to(torch.float32)  # what was left in a file came as it is stored there
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
