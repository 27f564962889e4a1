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
from typing import Any, cast

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from vlbench.model.mixed_precision import autocast_context
from vlbench.model.replicated_parameters import GradientAverager
from vlbench.model.vlm import VLM, VLMOutput


def build_shard_mesh(device_type: str, shard_count: int) -> DeviceMesh:
    """Return a mesh of all processes: `shard_count` share a model, the next ones the same again.

    With as many as there are it has one dimension, else two: replicas of the model, and shards of
    each. Neighbouring ranks share a model, so it stays within a machine.
    """
    process_count = distributed.get_world_size()
    if shard_count == process_count:
        return init_device_mesh(device_type, (process_count,), mesh_dim_names=("shard",))
    shape = (process_count // shard_count, shard_count)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replica", "shard"))


def apply_fsdp(vlm: VLM, mesh: DeviceMesh, bf16: bool = False) -> VLM:
    """Shard a model over the processes of `mesh`, that of `build_shard_mesh`.

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
    _shard_rest(vlm, mesh, set(replicated))
    if any(parameter.dtype.itemsize < 4 for parameter in vlm.parameters()):
        vlm.to(torch.float32)  # weights left in their files have the dtype of the files
    vlm.gradient_averager = GradientAverager(replicated)
    if bf16:
        _force_autocast(vlm, mesh.device_type)
    return vlm


@contextlib.contextmanager
def defer_gradient_reduction(vlm: VLM, keep_whole: bool) -> Iterator[None]:
    """Let the first backward pass after `with` reduce the gradients of those in it, too.

    With `keep_whole` every process keeps its whole gradients until then, 4 bytes for every trained
    parameter, and nothing is exchanged. Without it they are reduced to shards in every pass, and
    only what replicas of the model exchange is deferred.

    What lies outside of the units is not resharded in between: it would be gathered again at once,
    and the largest unit is computed beside it in any case.
    """
    averager = vlm.gradient_averager
    assert averager is not None
    # torch fails on units that never ran, as encoder blocks behind the layer that is used
    units = [module for module in vlm.modules() if isinstance(module, FSDPModule)]
    trained_units = [u for u in units if any(p.requires_grad for p in u.parameters())]

    def set_deferred(is_deferred: bool) -> None:
        for unit in trained_units:
            if keep_whole:
                unit.set_requires_gradient_sync(not is_deferred, recurse=False)
            else:
                unit.set_requires_all_reduce(not is_deferred, recurse=False)
        cast(FSDPModule, vlm).set_reshard_after_backward(not is_deferred, recurse=False)
        averager.is_paused = is_deferred

    set_deferred(True)
    try:
        yield
    finally:
        set_deferred(False)


def _shard_rest(vlm: VLM, mesh: DeviceMesh, replicated: set[nn.Parameter]) -> None:
    """Shard what belongs to no unit.

    FSDP2 reduces gradients once it has found a tensor in the output of a module, and torch 2.11
    looks into dicts but not into dataclasses. Where no unit is trained, as in BLIP-2's first stage,
    it reduced none, so its own hook sees the fields of the output as a dict.
    """
    vlm.register_forward_hook(lambda _module, _args, output: vars(output))
    fully_shard(vlm, mesh=mesh, ignored_params=replicated)
    vlm.register_forward_hook(lambda _module, _args, fields: VLMOutput(**fields))


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
    yield from vlm.encoder_blocks()
    yield from dict.fromkeys(_listed_blocks(vlm.connector.children()))


def _listed_blocks(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Yield the modules with a `forward` in module lists and dicts, also nested ones."""
    for module in modules:
        if isinstance(module, nn.ModuleDict | nn.ModuleList):
            children = list(module.children())
            yield from (m for m in children if type(m).forward is not nn.Module.forward)
            yield from _listed_blocks(children)
