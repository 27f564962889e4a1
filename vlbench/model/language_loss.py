"""The language loss: the projection to the vocabulary and its cross entropy, where supervised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vlbench.data.sample_encoding import IGNORE_INDEX

MIN_FUSED_LOGITS = 1 << 26
"""Logits from which they are made piece by piece: 2 ** 26 are 256 MB in float32. Fewer are faster
made at once."""
CHUNK_POSITIONS = 1024  # positions whose logits exist at the same time


def summed_loss(
    lm_head: nn.Module, hidden: Tensor, labels: Tensor, supervised_positions: Tensor | None = None
) -> Tensor:
    """Return the cross entropy of `labels` `[rows, length]`, summed over supervised positions.

    `hidden` is `[rows, length, lm_width]`; `where` holds the supervised positions, rows laid end to
    end, if they are known. Logits are made there alone, and never all at once where they are many.
    """
    hidden, labels = hidden.flatten(0, 1), labels.flatten()
    supervised: Tensor = (
        labels != IGNORE_INDEX if supervised_positions is None else supervised_positions
    )
    hidden, labels = hidden[supervised], labels[supervised]
    if _needs_fused_loss(lm_head, len(labels)):
        return _FusedCrossEntropy.apply(hidden, lm_head.weight, labels)  # type: ignore[no-any-return]
    logits = lm_head(hidden)
    precise = logits.float() if logits.dtype.itemsize < 4 else logits
    return cross_entropy(precise, labels, reduction="sum")


def _needs_fused_loss(lm_head: nn.Module, position_count: int) -> bool:
    """Tell whether there are many logits; a head that is no plain Linear makes them itself.

    An adapter is none, nor is a head whose weight is sharded.
    """
    if type(lm_head) is not nn.Linear or lm_head.bias is not None:
        return False
    return position_count * lm_head.out_features >= MIN_FUSED_LOGITS


class _FusedCrossEntropy(torch.autograd.Function):
    """Projection and cross entropy in pieces; the gradients are made on the way forward.

    torch's own `linear_cross_entropy` does the same and gives the sum in the type of the products:
    in bfloat16 it has three digits. Here the sum and the weight's gradient are float32.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the cross entropy of `labels` `[positions]`, float32."""
        of_hidden, of_weight, _ = ctx.needs_input_grad
        kind = matmul_dtype(hidden)
        products = weight.detach().to(kind)
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
        total = hidden.new_zeros((), dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            for begin in range(0, len(labels), CHUNK_POSITIONS):
                some = slice(begin, begin + CHUNK_POSITIONS)
                states, targets = hidden[some].to(kind), labels[some, None]
                logits = (states @ products.t()).float()
                norm = logits.logsumexp(-1, keepdim=True)
                total += (norm - logits.gather(-1, targets)).sum()
                if not (of_hidden or of_weight):
                    continue
                errors = logits.sub_(norm).exp_()  # of the logits: softmax less one at the target
                errors.scatter_add_(-1, targets, errors.new_full(targets.shape, -1.0))
                errors = errors.to(kind)
                if grad_hidden is not None:
                    grad_hidden[some] = errors @ products
                if grad_weight is not None:
                    grad_weight += errors.t() @ states
        ctx.gradients = grad_hidden, grad_weight, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        """Return the gradients that were made, times that of the sum; they are given once."""
        grad_hidden, grad_weight, kind = ctx.gradients
        ctx.gradients = None
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(grad)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad).to(kind)
        return grad_hidden, grad_weight, None


def matmul_dtype(hidden: Tensor) -> torch.dtype:
    """Return the type in which `hidden` is multiplied: under autocast it is autocast's."""
    device = hidden.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # of `meta` it knows nothing
        return hidden.dtype
    return torch.get_autocast_dtype(device)
