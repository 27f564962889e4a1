"""What is a unit of sharding (FSDP2): decoder layers, tower blocks, blocks of the connector.

A unit gathers its parameters when its `forward` is called, on every process in the same order. What
belongs to none (embeddings, head, the rest of a connector) is gathered once for the whole step, so
`inject`, `losses` and `objective` may read it, and connectors need no care for sharding.

Scalars, which FSDP2 refuses, stay whole in every process. So do the vectors of blocks that travel
in bfloat16 (of norms, biases), with which autocast computes in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from vlbench.model.replicated_parameters import GradientAverager
from vlbench.model.vlm import VLM


def apply_fsdp(vlm: VLM, mesh: DeviceMesh, bf16: bool = False) -> VLM:
    """Shard a model over the processes of `mesh`.

    With `half` the blocks of tower and language model travel in bfloat16, as which autocast would
    multiply them; gradients are summed in float32, and the rest stays as it is.
    """
    kind = torch.bfloat16 if bf16 else None
    sent = MixedPrecisionPolicy(kind, kind and torch.float32, cast_forward_inputs=False)
    blocks = list(fsdp_units(vlm))
    connector = set(vlm.connector.modules())
    exact = {block for block in blocks if block in connector or _has_dora(block)}
    kept = dict.fromkeys(
        parameter for parameter in vlm.parameters() if not _is_shardable(parameter)
    )
    if bf16:
        kept |= dict.fromkeys(
            parameter
            for block in blocks
            if block not in exact
            for parameter in block.parameters()
            if parameter.dim() == 1
        )
    for block in blocks:
        policy = MixedPrecisionPolicy() if block in exact else sent
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=set(kept))
    fully_shard(vlm, mesh=mesh, ignored_params=set(kept))
    if any(parameter.dtype.itemsize < 4 for parameter in vlm.parameters()):
        vlm.to(torch.float32)  # what was left in a file came as it is stored there
    GradientAverager(kept, mesh.get_group())
    if bf16:
        _force_autocast(vlm, mesh.device_type)
    return vlm


def _has_dora(block: nn.Module) -> bool:
    """Tell whether a block has DoRA's adapters, which measure its weights: not in 16 bits."""
    return any("lora_magnitude" in name for name, _ in block.named_parameters())


def _force_autocast(vlm: VLM, device: str) -> None:
    """Call a model whose blocks travel in bfloat16 under autocast, as training does anyway.

    Held-out losses are computed without, and would meet weights of another type than their inputs.
    """
    entered = contextlib.ExitStack()

    def enter_autocast(*_: Any) -> None:
        if not torch.is_autocast_enabled(device):
            entered.enter_context(torch.autocast(device, torch.bfloat16))

    def leave_autocast(*_: Any) -> None:
        entered.close()

    vlm.register_forward_pre_hook(enter_autocast)
    vlm.register_forward_hook(leave_autocast, always_call=True)


def _is_shardable(parameter: nn.Parameter) -> bool:
    """Tell whether FSDP2 can shard a parameter."""
    return parameter.dim() > 0 and parameter.is_floating_point()


@contextlib.contextmanager
def unsharded_connector(vlm: VLM) -> Iterator[None]:
    """Have the connector's parameters whole for a moment; every process has to do it."""
    sharded = [m for m in (vlm, *vlm.connector.modules()) if isinstance(m, FSDPModule)]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


def fsdp_units(vlm: VLM) -> Iterator[nn.Module]:
    """Give the blocks of all parts; those of a connector are what its lists of modules hold."""
    yield from vlm.language.model.layers
    yield from vlm.vision.blocks()
    yield from dict.fromkeys(_listed_blocks(vlm.connector.children()))


def _listed_blocks(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Give what lists among `modules` hold, also lists in lists, and has a `forward`."""
    for module in modules:
        if isinstance(module, nn.ModuleDict | nn.ModuleList):
            inside = list(module.children())
            yield from (m for m in inside if type(m).forward is not nn.Module.forward)
            yield from _listed_blocks(inside)
