"""Intervals of a share and exact tests, for where answers are few or all alike."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import bdtr

from vlbench.compare.report.seed_variance import SEED_EXPONENT

FEW_DISCORDANT = 25  # below this, McNemar's test is exact by the textbook's rule (Fleiss 1981)


def score_interval(
    share: float, count: float, quantile: float, seed_share: float = 0.0
) -> tuple[float, float]:
    """Return the shares from which `share` is at most `quantile` standard errors away.

    `count` are independent trials, or as many as a correlated sample is worth; `quantile` is that
    of Student's t where the variance is estimated. For trials alone this is Wilson's interval
    (1927, doi:10.1080/01621459.1927.10502953), for correlated ones its use in surveys (Franco et
    al. 2019, doi:10.1093/jssam/smy019). It is not empty at 0 and 1, and keeps its level near them,
    where the usual interval does not (Brown, Cai and DasGupta 2001, doi:10.1214/ss/1009213286).
    What comes from seeds, `seed_share` of the variance, is assumed to grow faster away from 0 and 1
    (`SEED_EXPONENT`), so that seeds that did well by chance do not hide how far they may spread.
    """
    reference = max(share * (1 - share), 1 / (count + 2))

    def distance(end: float) -> float:
        product = end * (1 - end)
        relative = (product / reference) ** (SEED_EXPONENT - 1)
        variance = product / count * (seed_share * relative + 1 - seed_share)
        return abs(share - end) - quantile * math.sqrt(variance)

    tiny = 1e-9
    low = 0.0 if share < 2 * tiny else _find_end(distance, tiny, share - tiny)
    high = 1.0 if share > 1 - 2 * tiny else _find_end(distance, 1 - tiny, share + tiny)
    return low, high


def _find_end(distance: Callable[[float], float], outer: float, inner: float) -> float:
    """Return where `distance` is 0 between an end of the scale and the share."""
    return float(brentq(distance, outer, inner)) if distance(outer) > 0 else round(outer)


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
    return min(1.0, 2 * float(bdtr(min(won, lost), won + lost, 0.5)))


def discordant_count(wins: NDArray[np.float64]) -> int:
    """Return how many clusters are won or lost."""
    return int((wins != 0).sum())
