"""Is one connector better than another? Paired differences over seeds and questions.

Every row answers the same questions with several seeds. A difference of two rows has three variance
components: seeds (another run gives another model), questions (another set asks something else; the
unit is the picture, `question_clusters`) and a residual. An interval that leaves one out is too
narrow; one that resamples three seeds is wrong in an unknown direction. What is promised here is
held against a simulation that shares no code with it: benchmarks/simulate_comparison.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from vlbench.compare.report import proportion_interval
from vlbench.compare.report.detectable_difference import (
    PairUncertainty,
    PlannedDesign,
    smallest_detectable,
)
from vlbench.compare.report.question_clusters import (
    CorrectMatrix,
    cluster_values,
    effective_clusters,
    number_clusters,
    sum_clusters,
)
from vlbench.compare.report.seed_variance import SeedVariances, UncertainVariance

CONFIDENCE_LEVEL = 0.95  # of intervals
ROUNDING = 1e-9  # sums of scores of the VQA challenge, in tenths, that are equal differ by less


@dataclass(frozen=True)
class PairedDifference:
    """The difference of two accuracies, from -1 to 1, with its uncertainty."""

    mean: float
    interval_low: float
    """Lower end of the 95 % interval."""
    interval_high: float
    p_value: float
    """Two-sided, of the null hypothesis that there is no difference."""
    uncertainty: PairUncertainty

    @cached_property
    def smallest_detectable(self) -> float:
        """Smallest difference that this design, with all of its pairs, finds in 80 of 100 times."""
        return smallest_detectable(self.uncertainty)

    def describe_difference(self, first_name: str, second_name: str) -> str:
        """Return a sentence on the difference of two named rows, in points (hundredths).

        With one seed it is one about two runs: nothing is known of the rows.
        """
        size = f"{abs(100 * self.mean):.1f} points"
        low, high = sorted((100 * self.interval_low, 100 * self.interval_high))
        if self.mean < 0:
            low, high = -high, -low
        word = "below" if self.mean < 0 else "above"
        if self.uncertainty.seed_count == 1:
            first_name, second_name = f"this run of {first_name}", f"that run of {second_name}"
        interval = f"95 % interval {low:.1f} to {high:.1f}"
        count = self.uncertainty.seed_count
        seeds = f"{count} seeds" if count > 1 else "1 seed"
        excludes_zero = self.interval_low > 0 or self.interval_high < 0
        is_level = abs(self.mean) < ROUNDING
        caution = "" if excludes_zero or is_level else "; this may be chance"
        if is_level:
            return f"{first_name} is level with {second_name} ({interval}; {seeds}{caution})"
        return f"{first_name} is {size} {word} {second_name} ({interval}; {seeds}{caution})"


class RowStatistics:
    """Accuracies of the rows of a comparison and their differences, with intervals."""

    def __init__(self, correct: NDArray[np.float64], clusters: NDArray[np.int64] | None = None):
        """Take answers `[rows, seeds, questions]`, 1 where right and 0 where wrong.

        `clusters` are numbers of what questions have in common, `[questions]`
        (`question_clusters.number_clusters`); without them every question is a cluster. Rows with
        the same seed are taken as independent; if seeds act on all rows alike, intervals of
        differences are too wide rather than too narrow.
        """
        self.correct = np.asarray(correct, float)
        self.row_count, self.seed_count, self.question_count = self.correct.shape
        if clusters is None:
            clusters = np.arange(self.question_count)
        self.clusters = clusters
        self.cluster_count = int(clusters.max()) + 1
        self.accuracies = self.correct.mean(axis=(1, 2))
        values = cluster_values(self.correct, clusters)
        self._between, self._noise = _mean_products(values)
        self._right = sum_clusters(self.correct.sum(axis=1), clusters)
        """Right answers of each row about each cluster `[rows, clusters]`, over seeds."""
        self._clusters_known = max(1.0, effective_clusters(clusters) - 1)
        """Degrees of freedom of what comes from clusters."""
        self._one_answer = 1 / (self.cluster_count * self.question_count * self.seed_count)
        """Variance of a mean that moves in steps of one answer, and is known to one at best: what
        adding half an answer to each cell of a paired table does (Agresti and Min 2005,
        doi:10.1002/sim.1781)."""

    @cached_property
    def _seed_variances(self) -> SeedVariances:
        by_seed = self.correct.mean(axis=2)
        return SeedVariances(
            between_seeds=by_seed.var(axis=1, ddof=1) * self.cluster_count,
            noise=np.maximum(np.diag(self._noise), 1 / self.question_count),
            seed_count=self.seed_count,
            cluster_count=self.cluster_count,
        )

    @property
    def seed_spread(self) -> float | None:
        """Standard deviation of a row's accuracy over seeds, without noise; None for one seed."""
        if self.seed_count == 1:
            return None
        variances = self._seed_variances
        excess = float((variances.between_seeds - variances.noise).mean()) / self.cluster_count
        return math.sqrt(max(0.0, excess))

    def planned_design(self, seed_spread: float, pair_count: int) -> PlannedDesign:
        """Return the design with these rows, pictures and accuracies, and some spread of seeds."""
        accuracy = float(self.accuracies.mean())
        return PlannedDesign(self.row_count, self.cluster_count, accuracy, seed_spread, pair_count)

    def of_questions(self, columns: Sequence[int]) -> RowStatistics:
        """Return the statistics of some of the questions."""
        clusters = number_clusters(self.clusters[list(columns)].tolist())
        return RowStatistics(self.correct[:, :, list(columns)], clusters)

    def _variance_of_mean(self, signs: NDArray[np.float64], extra: float) -> UncertainVariance:
        """Return the variance of a row's accuracy, or of a difference, by its `signs` `[rows]`.

        These may be any weights.
        """
        between = float(signs @ self._between @ signs)
        if self.seed_count == 1:
            return UncertainVariance(
                between / self.cluster_count + extra, self._clusters_known, 0.0
            )
        cells = self.seed_count * self.cluster_count
        # the expectation of the mean square of clusters has that of the residual in it
        known = max(0.0, between - float(signs @ self._noise @ signs)) / cells + extra
        rows = np.flatnonzero(signs).tolist()
        if set(np.abs(signs[rows])) == {1.0} and len(rows) <= 2:
            found = self._seed_variances.variance_of_sum(rows, known)
        else:
            found = self._seed_variances.variance_of_contrast(signs, known)
        share = 1 - found.seed_share
        degrees = 1 / (1 / found.degrees_of_freedom + share**2 / self._clusters_known)
        return replace(found, degrees_of_freedom=max(1.0, degrees))

    def accuracy_interval(self, row: int) -> tuple[float, float, float]:
        """Return a row's accuracy and the ends of its 95 % interval."""
        accuracy = float(self.accuracies[row])
        found = self._variance_of_mean(np.eye(self.row_count)[row], 0.0)
        rarer = self.correct[row] if accuracy <= 0.5 else 1 - self.correct[row]
        minority = int((sum_clusters(rarer.sum(axis=0), self.clusters) > 0).sum())
        count = proportion_interval.worth_of_answers(
            accuracy,
            found.variance,
            self.seed_count * self.question_count,
            self.cluster_count,
            minority,
        )
        quantile = float(stdtrit(found.degrees_of_freedom, (1 + CONFIDENCE_LEVEL) / 2))
        return accuracy, *proportion_interval.score_interval(
            accuracy, count, quantile, found.seed_share
        )

    def difference(
        self, first: int, second: int, pair_count: int | None = None
    ) -> PairedDifference:
        """Return how much better one row is than another.

        Where few clusters differ at all, p is at least that of the exact sign test. `pair_count`
        is the number of pairs over which p is going to be corrected; by default all pairs of rows.
        """
        signs = np.zeros(self.row_count)
        signs[[first, second]] = 1, -1
        mean = float(self.accuracies[first] - self.accuracies[second])
        found = self._variance_of_mean(signs, self._one_answer)
        error, degrees = math.sqrt(found.variance), found.degrees_of_freedom
        quantile = float(stdtrit(degrees, (1 + CONFIDENCE_LEVEL) / 2))
        p_value = float(2 * stdtr(degrees, -abs(mean) / error))
        wins = self._right[first] - self._right[second]
        wins[np.abs(wins) < ROUNDING] = 0
        if proportion_interval.discordant_count(wins) < proportion_interval.FEW_DISCORDANT:
            p_value = max(p_value, proportion_interval.sign_test(wins))
        return PairedDifference(
            mean=mean,
            interval_low=max(-1.0, mean - quantile * error),
            interval_high=min(1.0, mean + quantile * error),
            p_value=p_value,
            uncertainty=PairUncertainty(
                standard_error=error,
                degrees_of_freedom=degrees,
                accuracy=float(self.accuracies[[first, second]].mean()),
                seed_share=found.seed_share,
                pair_count=max(1, pair_count or self.row_count * (self.row_count - 1) // 2),
                question_count=self.cluster_count,
                seed_count=self.seed_count,
            ),
        )

    def contrast(self, weights: NDArray[np.float64]) -> tuple[float, float]:
        """Return a sum of accuracies times `weights` `[rows]`, and half its 95 % interval's width.

        Weights that sum to 0, half of them positive, are a difference of interpolated rows.
        """
        extra = self._one_answer * float(weights @ weights) / 2
        found = self._variance_of_mean(weights, extra)
        quantile = float(stdtrit(found.degrees_of_freedom, (1 + CONFIDENCE_LEVEL) / 2))
        return float(weights @ self.accuracies), quantile * math.sqrt(found.variance)


def _mean_products(values: NDArray[np.float64]) -> tuple[CorrectMatrix, CorrectMatrix]:
    """Return mean products between clusters and of the residual, each `[rows, rows]`.

    They are the mean squares of a two-way layout seeds x clusters, of rows and of any difference of
    rows: signs x matrix x signs. `values` is `[rows, seeds, clusters]`.
    """
    rows, seeds, clusters = values.shape
    by_cluster = values.mean(axis=1)
    of_cluster = by_cluster - by_cluster.mean(axis=1, keepdims=True)
    between = seeds * of_cluster @ of_cluster.T / max(1, clusters - 1)
    residual = values - values.mean(axis=2, keepdims=True) - of_cluster[:, None]
    flat = residual.reshape(rows, seeds * clusters)
    return between, flat @ flat.T / max(1, (seeds - 1) * (clusters - 1))


def holm_correction(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for multiple comparisons (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
