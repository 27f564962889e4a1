"""Losses and gradients of two ways to compute the same step, and where they differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vlbench.contract_checks.small_model import make_double_batch
from vlbench.data.packing import PackedBatch
from vlbench.data.sample import Sample
from vlbench.model.contrastive_loss import add_contrast_pools
from vlbench.model.loaded_vlm import LoadedVLM

NEGLIGIBLE_GRADIENT = 1e-7  # largest magnitude of a gradient that is rounding alone


class StepGradients(NamedTuple):
    """The loss of a step, and the gradient of every parameter that has one."""

    loss: float
    gradients: dict[str, Tensor]


def language_loss(vlm: LoadedVLM, batch: PackedBatch) -> Tensor:
    """Return the sum of the language loss over the supervised tokens of a batch."""
    loss = vlm(batch).loss_sum
    assert loss is not None  # the batch has labels
    return loss


def step_loss(vlm: LoadedVLM, batch: PackedBatch) -> Tensor:
    """Return the sum of the language loss and of the connector's own losses."""
    out = vlm(batch)
    assert out.loss_sum is not None  # the batch has labels
    return sum((value for value, _ in out.extra.values()), start=out.loss_sum)


def language_gradients(vlm: LoadedVLM, batches: Sequence[PackedBatch]) -> StepGradients:
    """Return the language loss per token over all batches, and its gradients."""
    vlm.model.zero_grad()
    tokens = sum(batch.supervised_token_count for batch in batches)
    total = 0.0
    for batch in batches:
        loss = language_loss(vlm, batch)
        (loss / tokens).backward()
        total += loss.item() / tokens
    return StepGradients(total, _copy_gradients(vlm))


def objective_gradients(vlm: LoadedVLM, rows: Sequence[Sequence[Sample]]) -> StepGradients:
    """Return loss and gradients of a step of the connector's own objective, a row at a time."""
    batches = [make_double_batch(vlm, [row]) for row in rows]
    torch.manual_seed(5)  # of the step
    vlm.model.zero_grad()
    total = 0.0
    for batch in add_contrast_pools(vlm.model, batches):
        losses = [value for value, _ in vlm(batch).extra.values()]
        loss = sum(losses[1:], start=losses[0])
        loss.backward()
        total += loss.item()
    return StepGradients(total, _copy_gradients(vlm))


def find_differences(
    ours: tuple[float, dict[str, Tensor]],
    theirs: tuple[float, dict[str, Tensor]],
    tolerance: float = 1e-5,
) -> list[str]:
    """Return what differs: "the loss", and names of parameters whose gradients do.

    The connector's own come first.

    Gradients are compared by max|a-b| / max|a| of a tensor; NaN differs from everything.
    """
    found = []
    if not abs(ours[0] - theirs[0]) <= tolerance * abs(ours[0]):
        found.append("the loss")
    found += sorted(ours[1].keys() ^ theirs[1].keys())
    for name in [name for name in ours[1] if name in theirs[1]]:
        grad, other = _drop_key_bias(name, ours[1][name]), _drop_key_bias(name, theirs[1][name])
        scale = grad.abs().max()
        if not (scale <= NEGLIGIBLE_GRADIENT or (grad - other).abs().max() <= tolerance * scale):
            found.append(name)
    return sorted(found, key=lambda name: not name.startswith(("the loss", "connector.")))


def _copy_gradients(vlm: LoadedVLM) -> dict[str, Tensor]:
    parameters = vlm.model.named_parameters()
    return {name: p.grad.clone() for name, p in parameters if p.grad is not None}


def _drop_key_bias(name: str, grad: Tensor) -> Tensor:
    """Leave out the key third of a fused qkv bias: its gradient is zero but for rounding."""
    if not name.endswith("in_proj_bias"):
        return grad
    width = len(grad) // 3
    return grad[torch.arange(len(grad)) // width != 1]
