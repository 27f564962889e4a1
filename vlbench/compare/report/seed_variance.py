"""How far seeds spread: what a few runs of several rows tell about it, taken together.

Three seeds tell next to nothing about the variance of one row's seeds (two degrees of freedom), but
the rows of a comparison have similar variances. limma squeezes the variances of genes towards each
other (Smyth 2004, doi:10.2202/1544-6115.1027), with a prior whose parameters are estimated from
thousands of genes. A comparison has two to eight rows, too few for an estimate, so the same model
is averaged over its parameters here instead:

    mean square between a row's seeds ~ t_r x chi-squared(d) / d,    d = seeds - 1
    t_r = w_r (1 + x_r),   log x_r ~ normal(log common level, spread of the rows)

`w_r`, the noise of a run's answers, is known well (its mean square is over all questions), and a
variance of seeds adds to it: t_r >= w_r (Tiao and Tan 1965, doi:10.1093/biomet/52.1-2.37, whose
prior for a variance component, flat in log t, is taken for the common level). As w_r follows a
row's accuracy a about as a (1 - a), so does the variance of its seeds, as limma's trend follows the
mean. Rows may differ: `ROW_SPREADS`. These and `LEVEL_WEIGHTS` were chosen by
simulation (benchmarks/simulate_comparison.py): with rows that are more alike, one whose seeds
spread three times as far raises false alarms; with rows less alike, power is lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.special import digamma, polygamma

Floats = NDArray[np.float64]

LEVELS = np.linspace(0.0, 9.0, 19)
"""Log of 1 + x at the common level: x = 8,000 are seeds from 0 to 1 with thousands of questions."""
LEVEL_WEIGHTS = np.where(LEVELS == 0, 4.0, 1.0)
"""Prior weights; that of seeds without any effect is higher, as this prior is far from it."""
ROW_SPREADS = np.array([0.7, 1.4, 2.1])
"""Standard deviations of log x over rows, equally likely: factors of 2, 4 and 8 in variance."""
TRIGAMMA_ARGUMENTS = np.geomspace(0.5, 5e6, 500)
LOG_ARGUMENTS, LOG_VALUES = np.log(TRIGAMMA_ARGUMENTS), np.log(polygamma(1, TRIGAMMA_ARGUMENTS))
VARIANCE_INFLATION = 1.35
"""Factor of the variance of seeds: their effect on accuracy is skewed where it is large, for which
the tails of t are slightly short."""
SEED_EXPONENT = 1.5
"""The variance of seeds is taken to follow this power of a (1 - a) where an accuracy a changes; 2
would be effects that are alike in log odds, 1 is the prior's trend. Chosen by simulation."""
NODES, NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(7)
NODE_WEIGHTS = NODE_WEIGHTS / NODE_WEIGHTS.sum()


@dataclass(frozen=True)
class UncertainVariance:
    """A variance that is known as one that was estimated with some degrees of freedom."""

    variance: float
    degrees_of_freedom: float
    seed_share: float
    """What comes from seeds, from 0 to 1."""


@dataclass(frozen=True)
class SeedVariances:
    """Variances of seeds of all rows, given their mean squares (units of one cluster's mean)."""

    between_seeds: Floats
    """`[rows]`, mean square between seeds."""
    noise: Floats
    """`[rows]`, mean square of the residual; above 0."""
    seed_count: int
    """At least 2."""
    cluster_count: int

    @cached_property
    def _totals(self) -> Floats:
        """Variance `t` of a cluster's mean over seeds `[rows, levels, spreads, nodes]`."""
        level = np.expm1(LEVELS)[:, None, None] * np.exp(ROW_SPREADS[:, None] * NODES)
        total: Floats = self.noise[:, None, None, None] * (1 + level)
        return total

    @cached_property
    def _variances_of_mean(self) -> Floats:
        """Variances of rows' means `[rows, levels, spreads, nodes]`, with the inflation."""
        noise = self.noise[:, None, None, None]
        cells = self.seed_count * self.cluster_count
        variances: Floats = (noise + VARIANCE_INFLATION * (self._totals - noise)) / cells
        return variances

    @cached_property
    def _node_weights(self) -> tuple[Floats, Floats]:
        """Posterior weights of the nodes given level and spread, and of levels and spreads."""
        degrees = self.seed_count - 1
        ratio = self.between_seeds[:, None, None, None] / self._totals
        log_likelihood = -degrees / 2 * (np.log(self._totals) + ratio)
        largest = log_likelihood.max(axis=(1, 2, 3), keepdims=True)
        weights = NODE_WEIGHTS * np.exp(log_likelihood - largest)
        of_row = weights.sum(axis=3)
        joint = LEVEL_WEIGHTS[:, None] * np.exp(np.log(of_row + 1e-300).sum(axis=0))
        return weights / (of_row[..., None] + 1e-300), joint / joint.sum()

    def variance_of_sum(self, rows: Sequence[int], known: float) -> UncertainVariance:
        """Return the variance of the sum of one or two rows' means, where `known` is added to it.

        The mean, given the answers, is a mixture of normals over the variances. It is replaced by
        Student's t of the same mean and variance of the log variance, as limma matches them; where
        seeds alone decide, this is the usual t test with the rows' degrees of freedom together.
        """
        nodes, joint = self._node_weights
        totals, weights = self._variances_of_mean[rows[0]], nodes[rows[0]]
        if len(rows) > 1:
            totals = totals[..., :, None] + self._variances_of_mean[rows[1]][..., None, :]
            weights = weights[..., :, None] * nodes[rows[1]][..., None, :]
        logs = np.log(totals + known)
        weighted = weights * logs
        axes = tuple(range(2, logs.ndim))
        mean = float((joint * weighted.sum(axis=axes)).sum())
        spread = float((joint * (weighted * logs).sum(axis=axes)).sum()) - mean**2
        noise = known + float(self.noise[list(rows)].sum()) / (self.seed_count * self.cluster_count)
        return _match_student(mean, spread, noise)

    @cached_property
    def _row_moments(self) -> tuple[Floats, Floats]:
        """Mean and variance of rows' variances, each `[rows, levels, spreads]`."""
        nodes, _ = self._node_weights
        totals = self._variances_of_mean
        means = (nodes * totals).sum(axis=3)
        spread = (nodes * (totals - means[..., None]) ** 2).sum(axis=3)
        return means, spread

    def variance_of_contrast(self, weights: Floats, known: float) -> UncertainVariance:
        """Return the variance of a sum of rows' means times `weights` `[rows]`, plus `known`.

        As `variance_of_sum`, for any number of rows: given level and spread, the sum of the rows'
        variances is taken as log-normal with its own mean and variance (Fenton 1960,
        doi:10.1109/TCOM.1960.1097606), which spares the nodes of all rows together.
        """
        means, variances = self._row_moments
        _, joint = self._node_weights
        squares = weights**2
        mean = known + np.tensordot(squares, means, 1)
        log_spread = np.log1p(np.tensordot(squares**2, variances, 1) / mean**2)
        log_mean = np.log(mean) - log_spread / 2
        middle = float((joint * log_mean).sum())
        spread = float((joint * (log_spread + log_mean**2)).sum()) - middle**2
        noise = known + float(squares @ self.noise) / (self.seed_count * self.cluster_count)
        return _match_student(middle, spread, noise)


def _match_student(log_mean: float, log_spread: float, noise: float) -> UncertainVariance:
    """Return the variance whose log, by its estimate, has this mean and this variance.

    `noise` is the part of it that does not come from seeds.
    """
    degrees = 2 * inverse_trigamma(max(log_spread, 1e-6))
    scale = np.exp(log_mean - np.log(degrees / 2) + digamma(degrees / 2))
    return UncertainVariance(float(scale), degrees, 1 - min(1.0, noise / scale))


def inverse_trigamma(value: float) -> float:
    """Return x with trigamma(x) = value, by interpolation; from 0.5 to 5 million."""
    return math.exp(np.interp(-math.log(value), -LOG_VALUES, LOG_ARGUMENTS))
