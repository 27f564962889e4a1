"""How much a connector rearranges pictures: do the nearest ones stay the nearest?

The k-nearest-neighbour overlap ratio of Li et al. 2025 (arXiv:2509.11986): a picture is the mean of
its tokens, distances are Euclidean, and of the `k` nearest pictures before the connector a share is
among the `k` nearest behind it. 1: the connector keeps every neighbourhood; `k` / (pictures - 1):
what two unrelated spaces share by chance.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOUR_COUNT = 10  # the smallest of the paper's 10, 50 and 100: it has more pictures


def neighbour_overlap(before: Tensor, behind: Tensor, count: int = NEIGHBOUR_COUNT) -> Tensor:
    """Return the share of each picture's `count` nearest that two spaces have in common.

    `before` and `behind` are `[pictures, tokens, width]`, each with its own tokens and width; there
    are more pictures than `count`. The result is `[pictures]`.
    """
    first, second = (_nearest(features, count) for features in (before, behind))
    return (first[:, :, None] == second[:, None, :]).any(2).double().mean(1)


def _nearest(features: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` nearest other pictures, `[pictures, count]`."""
    means = features.float().cpu().mean(1).double()
    distances = torch.cdist(means, means)
    distances.fill_diagonal_(float("inf"))
    return distances.topk(count, largest=False).indices
