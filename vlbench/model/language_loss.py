"""The language loss: output projection and cross entropy at supervised positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vlbench.data.sample_encoding import IGNORE_INDEX

MIN_FUSED_LOGITS = 1 << 26
"""Number of logits from which they are computed in chunks: 2 ** 26 take 256 MB in float32. Fewer
are faster in one piece."""
CHUNK_POSITIONS = 1024  # positions whose logits exist at the same time


def summed_loss(
    lm_head: nn.Module, hidden: Tensor, labels: Tensor, supervised_positions: Tensor | None = None
) -> Tensor:
    """Return the cross entropy of `labels` `[rows, length]`, summed over supervised positions.

    `hidden` is `[rows, length, lm_width]`; `supervised_positions` are indices into the flattened
    rows, if they are known. Logits are computed at these positions only, in chunks if there are
    many.
    """
    hidden, labels = hidden.flatten(0, 1), labels.flatten()
    supervised: Tensor = (
        labels != IGNORE_INDEX if supervised_positions is None else supervised_positions
    )
    hidden, labels = hidden[supervised], labels[supervised]
    if _needs_fused_loss(lm_head, len(labels)):
        loss: Tensor = _FusedCrossEntropy.apply(hidden, lm_head.weight, labels)
        return loss
    logits = lm_head(hidden)
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    return cross_entropy(logits, labels, reduction="sum")


def _needs_fused_loss(lm_head: nn.Module, position_count: int) -> bool:
    """Tell whether there are many logits and the head is a plain Linear layer.

    A head with an adapter or with a sharded weight is not: it computes its logits itself.
    """
    if type(lm_head) is not nn.Linear or lm_head.bias is not None:
        return False
    return position_count * lm_head.out_features >= MIN_FUSED_LOGITS


class _FusedCrossEntropy(torch.autograd.Function):
    """Projection and cross entropy in chunks; the gradients are computed in the forward pass.

    torch's own `linear_cross_entropy` does the same but returns the sum in the dtype of the
    products: in bfloat16 it has three digits. Here the sum and the weight's gradient are float32.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the cross entropy of `labels` `[positions]`, float32."""
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        dtype = matmul_dtype(hidden)
        cast_weight = weight.detach().to(dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        total = hidden.new_zeros((), dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            for begin in range(0, len(labels), CHUNK_POSITIONS):
                chunk = slice(begin, begin + CHUNK_POSITIONS)
                states, targets = hidden[chunk].to(dtype), labels[chunk, None]
                logits = (states @ cast_weight.t()).float()
                norm = logits.logsumexp(-1, keepdim=True)
                total += (norm - logits.gather(-1, targets)).sum()
                if not (needs_hidden or needs_weight):
                    continue
                # gradient of the logits: softmax, minus one at the target
                errors = logits.sub_(norm).exp_()
                errors.scatter_add_(-1, targets, errors.new_full(targets.shape, -1.0))
                errors = errors.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[chunk] = errors @ cast_weight
                if grad_weight is not None:
                    grad_weight += errors.t() @ states
        ctx.gradients = grad_hidden, grad_weight, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients of the forward pass times that of the sum; works once."""
        grad_hidden, grad_weight, weight_dtype = ctx.gradients
        ctx.gradients = None
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(grad)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad).to(weight_dtype)
        return grad_hidden, grad_weight, None


def matmul_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of products of `hidden`: under autocast, that of autocast."""
    device = hidden.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # autocast does not know `meta`
        return hidden.dtype
    return torch.get_autocast_dtype(device)
