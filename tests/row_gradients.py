"""Loss and gradients of a model over micro-batches of one row each, in one process and in two."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from forked_processes import run_in_processes
from random_vlm import make_batch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vlbench.data.sample import Sample
from vlbench.model.fsdp_wrapping import apply_fsdp
from vlbench.model.loaded_vlm import LoadedVLM


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def learn(vlm: LoadedVLM, rows: list[list[Sample]]) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients over micro-batches of one row each, in float64."""
    vlm = vlm.to(torch.float64)
    batches = [make_batch(vlm, [row]).to("cpu", torch.float64) for row in rows]
    tokens = sum(batch.supervised_token_count for batch in batches)
    total = 0.0
    for batch in batches:
        loss = vlm(batch).loss_sum / tokens
        loss.backward()
        total += float(loss.detach())
    return total, gradients(vlm.model)


def two_process_differences(
    build: Callable[[], LoadedVLM],
    shares: list[list[list[Sample]]],
    wrap: str,
    near: Mapping[str, float],
) -> list[list[str]]:
    """Return the names of gradients of one process that each of two processes does not have.

    Args:
        build: Returns the model, the same at each call.
        shares: Of each process the micro-batches, of one row each.
        wrap: "sharded" (FSDP2) or "replicated" (DDP).
        near: By the end of a parameter's name ("" for all others) how near is the same, relative
            to its gradient.
    """
    vlm = build().to(torch.float64)
    for row in (row for share in shares for row in share):
        (vlm(make_batch(vlm, [row]).to("cpu", torch.float64)).loss_sum / len(shares)).backward()
    expected = gradients(vlm.model)

    def compare(rank: int) -> list[str]:
        own = build().to(torch.float64)
        if wrap == "sharded":
            call = apply_fsdp(own.model, distributed.device_mesh.init_device_mesh("cpu", (2,)))
        else:
            call = DistributedDataParallel(own.model)
        for row in shares[rank]:
            call(make_batch(own, [row]).to("cpu", torch.float64)).loss_sum.backward()
        found = gradients(own.model)
        assert found.keys() == expected.keys()
        bounds = {name: near[max(filter(name.endswith, near), key=len)] for name in expected}
        return [
            name
            for name, value in expected.items()
            if float((found[name] - value).abs().max())
            > bounds[name] * max(1, float(value.abs().max()))
        ]

    return run_in_processes(compare)
