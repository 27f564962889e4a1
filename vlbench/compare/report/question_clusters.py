"""Questions about the same picture stand or fall together: the picture is what was sampled.

A model that misreads a picture fails several of its questions, so these are not as many independent
trials. The unit of the statistics is the cluster: the questions that share a picture, or else a
conversation (Cameron and Miller 2015, doi:10.3368/jhr.50.2.317; for language models Miller 2024,
arXiv:2411.00640).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

CorrectMatrix = NDArray[np.float64]
"""`[seeds, questions]`, 1 where the answer is right and 0 where it is wrong."""


def number_clusters(names: Sequence[object]) -> NDArray[np.int64]:
    """Return a number from 0 for each question, the same for those with an equal cluster name."""
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)


def sum_clusters(values: NDArray[np.float64], clusters: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return sums over clusters `[..., clusters]` of `values` `[..., questions]`."""
    count = int(clusters.max()) + 1
    if count == values.shape[-1]:
        return values
    order = np.argsort(clusters, kind="stable")
    starts = np.searchsorted(clusters[order], np.arange(count))
    sums: NDArray[np.float64] = np.add.reduceat(values[..., order], starts, axis=-1)
    return sums


def cluster_values(correct: NDArray[np.float64], clusters: NDArray[np.int64]) -> CorrectMatrix:
    """Return a value per cluster `[..., clusters]`, of which the mean is the share that is right.

    A share over clusters of unequal sizes is a ratio of two means; the values are those of its
    linearisation (Cochran 1977, Sampling Techniques, section 6.4), so that their variance is right.
    With clusters of one question they are the answers themselves.
    """
    share = correct.mean(axis=-1, keepdims=True)
    sizes = np.bincount(clusters)
    right = sum_clusters(correct, clusters)
    values: CorrectMatrix = share + (right - share * sizes) * len(sizes) / correct.shape[-1]
    return values


def effective_clusters(clusters: NDArray[np.int64]) -> float:
    """Return how many clusters of one size tell as much of their variance as these.

    It is their number where they are of one size, and less where a few hold most of the questions:
    the variance of a share rests on these then, and an estimate of it has few degrees of freedom
    (Satterthwaite 1946, doi:10.2307/3002019, with a cluster's variance as its size).
    """
    sizes = np.bincount(clusters)
    return float(sizes.sum() ** 2 / (sizes**2).sum())
