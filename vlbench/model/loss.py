"""The language loss: the projection to the vocabulary and its cross entropy, where supervised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlbench.data.sample import IGNORE

FUSED_FROM = 1 << 26
"""Logits from which the fused loss is taken: 2 ** 26 are 256 MB in float32. For fewer the plain
one is faster."""


def summed_loss(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy of `labels` `[rows, length]`, summed over supervised positions.

    `hidden` is `[rows, length, lm_width]`. Logits are made at supervised positions alone, and never
    all at once where they are many and this torch can do without.
    """
    supervised = labels != IGNORE
    hidden, labels = hidden[supervised], labels[supervised]
    if _fused(head, len(labels)):
        loss: Any = functional.linear_cross_entropy
        options = nn.LinearCrossEntropyOptions()
        kind = _product_type(hidden)
        weight = head.weight.to(kind)  # type: ignore[operator]
        total = loss(hidden.to(kind), weight, labels, reduction="sum", options=options)
        return total.float()
    return functional.cross_entropy(head(hidden).float(), labels, reduction="sum")


def _fused(head: nn.Module, positions: int) -> bool:
    """Tell whether the fused loss serves: a plain Linear without bias, and many logits."""
    if type(head) is not nn.Linear or head.bias is not None:
        return False
    return can_fuse() and positions * head.out_features >= FUSED_FROM


def _product_type(hidden: Tensor) -> torch.dtype:
    """Return the type in which `head` would be multiplied: under autocast it is autocast's."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def can_fuse() -> bool:
    """Tell whether this torch has the fused loss (2.13 and later)."""
    return hasattr(functional, "linear_cross_entropy") and hasattr(nn, "LinearCrossEntropyOptions")
