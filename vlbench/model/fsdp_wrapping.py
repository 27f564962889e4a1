"""FSDP2 wrapping: decoder layers, vision encoder blocks and connector blocks are sharded units.

A unit all-gathers its parameters when its `forward` is called, in every process in the same order.
What belongs to no unit (embeddings, head, the rest of a connector) is gathered once for the whole
forward pass, so `inject`, `losses` and `objective` can read it, and connectors need not care.

Scalars, which FSDP2 refuses, are replicated. So are the vectors (norms, biases) of units that are
gathered in bfloat16: autocast computes with them in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from vlbench.model.mixed_precision import autocast_context
from vlbench.model.replicated_parameters import GradientAverager
from vlbench.model.vlm import VLM


def apply_fsdp(vlm: VLM, mesh: DeviceMesh, bf16: bool = False) -> VLM:
    """Shard a model over the processes of `mesh`.

    With `bf16` the blocks of vision encoder and language model are gathered in bfloat16, in which
    autocast would multiply them anyway; gradients are reduced in float32.
    """
    dtype = torch.bfloat16 if bf16 else None
    block_policy = MixedPrecisionPolicy(dtype, dtype and torch.float32, cast_forward_inputs=False)
    blocks = list(fsdp_units(vlm))
    connector = set(vlm.connector.modules())
    float32_blocks = {block for block in blocks if block in connector or _has_dora(block)}
    replicated = dict.fromkeys(
        parameter for parameter in vlm.parameters() if not _is_shardable(parameter)
    )
    if bf16:
        replicated |= dict.fromkeys(
            parameter
            for block in blocks
            if block not in float32_blocks
            for parameter in block.parameters()
            if parameter.dim() == 1
        )
    for block in blocks:
        policy = MixedPrecisionPolicy() if block in float32_blocks else block_policy
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=set(replicated))
    fully_shard(vlm, mesh=mesh, ignored_params=set(replicated))
    if any(parameter.dtype.itemsize < 4 for parameter in vlm.parameters()):
        vlm.to(torch.float32)  # weights left in their files have the dtype of the files
    GradientAverager(replicated, mesh.get_group())
    if bf16:
        _force_autocast(vlm, mesh.device_type)
    return vlm


def _has_dora(block: nn.Module) -> bool:
    """Tell whether a block has DoRA adapters, which need the norm of its weights in float32."""
    return any("lora_magnitude" in name for name, _ in block.named_parameters())


def _force_autocast(vlm: VLM, device: str) -> None:
    """Run the model's forward under autocast, also where the caller does not.

    Held-out losses are computed without autocast, but the gathered weights are bfloat16.
    """
    autocast = contextlib.ExitStack()

    def enter_autocast(*_: Any) -> None:
        if not torch.is_autocast_enabled(device):
            autocast.enter_context(autocast_context(device, bf16=True))

    def leave_autocast(*_: Any) -> None:
        autocast.close()

    vlm.register_forward_pre_hook(enter_autocast)
    vlm.register_forward_hook(leave_autocast, always_call=True)


def _is_shardable(parameter: nn.Parameter) -> bool:
    """Tell whether FSDP2 can shard a parameter."""
    return parameter.dim() > 0 and parameter.is_floating_point()


@contextlib.contextmanager
def unsharded_connector(vlm: VLM) -> Iterator[None]:
    """Unshard the connector's parameters inside of `with`; every process has to call it."""
    sharded = [m for m in (vlm, *vlm.connector.modules()) if isinstance(m, FSDPModule)]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


def fsdp_units(vlm: VLM) -> Iterator[nn.Module]:
    """Yield the blocks of all parts; those of a connector are in its module lists."""
    yield from vlm.language.model.layers
    yield from vlm.vision.blocks()
    yield from dict.fromkeys(_listed_blocks(vlm.connector.children()))


def _listed_blocks(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Yield the modules with a `forward` in module lists and dicts, also nested ones."""
    for module in modules:
        if isinstance(module, nn.ModuleDict | nn.ModuleList):
            children = list(module.children())
            yield from (m for m in children if type(m).forward is not nn.Module.forward)
            yield from _listed_blocks(children)
