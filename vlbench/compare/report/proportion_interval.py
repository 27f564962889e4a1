"""Intervals of a share and exact tests, for where answers are few or all alike."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

FEW_DISCORDANT = 25  # below this, McNemar's test is exact by the textbook's rule (Fleiss 1981)


def wilson_interval(share: float, count: float, quantile: float) -> tuple[float, float]:
    """Return Wilson's interval (1927, doi:10.1080/01621459.1927.10502953) of a share.

    `count` are independent trials, or as many as a correlated sample is worth; `quantile` is that
    of Student's t where the variance is estimated (Franco et al. 2019, doi:10.1093/jssam/smy019,
    found that to hold for clustered samples). It is not empty at 0 and 1, and keeps its level near
    them, where the usual interval does not (Brown, Cai and DasGupta 2001,
    doi:10.1214/ss/1009213286).
    """
    square = quantile**2
    center = (share + square / (2 * count)) / (1 + square / count)
    inside = share * (1 - share) / count + square / (4 * count**2)
    half = quantile * math.sqrt(inside) / (1 + square / count)
    # at 0 and 1 the near end is exact
    low = 0.0 if share == 0 else max(0.0, center - half)
    high = 1.0 if share == 1 else min(1.0, center + half)
    return low, high


def worth_of_answers(
    share: float, variance: float, answer_count: int, cluster_count: int, minority: int
) -> float:
    """Return how many independent answers a share is worth (Kish 1965: n over the design effect).

    `variance` is the estimated variance of the share. The design effect is at least 1, so that an
    interval is never narrower than the noise of its answers. With few clusters of the rarer kind
    (`minority` of `cluster_count`), it is hardly known: one more of them is assumed, in which all
    answers of all seeds are alike; with none, a cluster counts once.
    """
    largest = answer_count / cluster_count
    noise = share * (1 - share) / answer_count
    effect = max(1.0, variance / noise) if noise > 0 else largest
    return answer_count * (minority + 1) / (minority * effect + max(largest, 1.0))


def sign_test(wins: NDArray[np.float64]) -> float:
    """Return the exact two-sided p of clusters won (above 0) and lost (below 0), 1 without any.

    With one question per cluster and one seed it is McNemar's exact test.
    """
    won, lost = int((wins > 0).sum()), int((wins < 0).sum())
    return min(1.0, 2 * float(stats.binom.cdf(min(won, lost), won + lost, 0.5)))


def discordant_count(wins: NDArray[np.float64]) -> int:
    """Return how many clusters are won or lost."""
    return int((wins != 0).sum())
