"""Loss and gradients of a model over micro-batches of one row each."""

from __future__ import annotations

import torch
from random_vlm import make_batch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vlbench.data.sample import Sample
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
