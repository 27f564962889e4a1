"""The smallest difference that a comparison would find, as it is going to be tested.

A pair is called different if its p is below the level after Holm's correction over all pairs; so
the smallest p has to be below level / pairs. How often that happens at a true difference is told by
the noncentral t distribution (Cohen 1988, Statistical Power Analysis, chapter 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats
from scipy.optimize import brentq
from scipy.special import gammaln, stdtrit

from vlbench.compare.report.proportion_interval import FEW_DISCORDANT
from vlbench.compare.report.seed_variance import (
    SEED_EXPONENT,
    SeedVariances,
    UncertainVariance,
)

SIGNIFICANCE_LEVEL = 0.05  # largest p, after Holm's correction, of a significant difference
PLANNED_SEEDS = (3, 5, 10)  # numbers of seeds for which a plan says what they would find
STATISTICAL_POWER = 0.8  # probability of finding the smallest detectable difference
MAX_CRITICAL = 10.0  # a difference that has to be larger, from 0 to 1, is not found
UNDETECTABLE = 1.0  # in place of a difference where not even the largest one is found so often
FEW_PICTURES = 40
ROUGH_FIGURES = (
    f"A smallest detectable difference with fewer than {FEW_PICTURES} pictures is a rough figure "
    "('about'): in simulated comparisons such a difference was found in 40 to 99 of 100 cases "
    "instead of 80."
)
"""70 to 99 of benchmarks/simulated_comparison.md, cells of 10 and 30 questions; 40 to 80 where
8 to 15 pictures have several questions each."""
KEPT_DIGITS = 3
"""Of degrees of freedom: noncentralities of those that agree in so many differ by less than 1 %."""


@dataclass(frozen=True)
class PairUncertainty:
    """How well the difference of two rows is known, as far as power depends on it."""

    standard_error: float
    degrees_of_freedom: float
    accuracy: float
    """Mean of the two rows."""
    seed_share: float
    """Of the variance, what comes from seeds; the rest is the noise of answers."""
    pair_count: int
    """Of the whole comparison."""
    question_count: int
    """Or as many pictures, if several questions are about the same one."""
    seed_count: int


def smallest_detectable(pair: PairUncertainty) -> float:
    """Return the smallest true difference found with `STATISTICAL_POWER`, or `UNDETECTABLE`.

    It is significant even if no other pair of the comparison differs. Rows that differ so much
    cannot both have the pair's accuracy, with which the variance changes (`_variance_ratio`). An
    estimated standard error is too small on average; the factor that makes it right for normal data
    is divided out (the c4 of control charts). Where fewer clusters differ than the exact test needs
    there is none, whatever the standard error (`_found_by_sign_test`).
    """
    degrees = pair.degrees_of_freedom
    level = SIGNIFICANCE_LEVEL / (2 * pair.pair_count)
    by_sign_test = _found_by_sign_test(pair.question_count, pair.seed_count, level)
    critical = float(stdtrit(degrees, 1 - level))
    # of so large numbers, at few degrees of freedom, the distribution takes seconds, with warnings
    if by_sign_test == UNDETECTABLE or critical * pair.standard_error > MAX_CRITICAL:
        return UNDETECTABLE

    noncentrality = _needed_noncentrality(level, float(f"{degrees:.{KEPT_DIGITS}g}"))
    shrinkage = math.sqrt(2 / degrees) * math.exp(gammaln((degrees + 1) / 2) - gammaln(degrees / 2))
    step = noncentrality * pair.standard_error / shrinkage

    def surplus(difference: float) -> float:
        return float(difference - step * math.sqrt(_variance_ratio(pair, difference)))

    by_t = float(brentq(surplus, 0.0, 1.0)) if surplus(1.0) > 0 else UNDETECTABLE
    return max(by_t, by_sign_test)


@lru_cache(maxsize=100_000)  # many pairs of a large comparison are alike
def _needed_noncentrality(level: float, degrees: float) -> float:
    """Return the noncentrality of t that is found at a one-sided level so often."""
    critical = float(stats.t.isf(level, degrees))

    def missing_power(noncentrality: float) -> float:
        # scipy 1.13 warns of steps within its algorithm; brentq refuses a result that is NaN
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(stats.nct.sf(critical, degrees, noncentrality)) - STATISTICAL_POWER

    return float(brentq(missing_power, 0.0, 10 * critical + 10))


@lru_cache(maxsize=1000)
def _found_by_sign_test(question_count: int, seed_count: int, level: float) -> float:
    """Return the smallest difference that the exact sign test finds so often, or `UNDETECTABLE`.

    `level` is that of one side. So many clusters without a loss as make it significant have to be
    won, by the binomial distribution. More seeds make no more clusters: half of what tells rows
    apart is taken to be in every seed, and the rest to be any seed's own, of which one is enough.
    """
    needed = min(math.ceil(-math.log2(level)), FEW_DISCORDANT)
    if needed > question_count:
        return UNDETECTABLE
    won = float(stats.beta.ppf(STATISTICAL_POWER, needed, question_count - needed + 1))

    def surplus(difference: float) -> float:
        return (difference + 1 - (1 - difference) ** seed_count) / 2 - won

    return float(brentq(surplus, 0.0, 1.0))


def _variance_ratio(pair: PairUncertainty, difference: float) -> float:
    """Return the variance of two rows that differ, relative to two of the same accuracy.

    They lie around it, the better one at most half of the way to the nearer end of the scale. The
    variance of an answer follows an accuracy a as a (1 - a), that of seeds as a power of it.
    """
    edge = min(0.5, 1.5 / pair.question_count)  # nearer to 0 or 1 an accuracy is not known
    middle = min(max(pair.accuracy, edge), 1 - edge)
    near = min(difference / 2, min(middle, 1 - middle) / 2)
    up = near if middle > 0.5 else difference - near
    ends = (min(middle + up, 1.0), max(middle - difference + up, 0.0))
    relative = [end * (1 - end) / (middle * (1 - middle)) for end in ends]
    of_seeds: float = sum(one**SEED_EXPONENT for one in relative) / 2
    of_answers = sum(relative) / 2
    return pair.seed_share * of_seeds + (1 - pair.seed_share) * of_answers


@dataclass(frozen=True)
class PlannedDesign:
    """A comparison before its runs, with what is assumed of them."""

    row_count: int
    question_count: int
    """Or as many pictures, if several questions are about the same one."""
    accuracy: float
    """Of every row."""
    seed_spread: float
    """Standard deviation of a row's accuracy over seeds, of infinitely many questions."""
    pair_count: int | None = None
    """Of rows that are tested against each other; None for all."""

    def detectable_with(self, seed_count: int) -> float:
        """Return the smallest detectable difference with some seeds.

        Half of the variance of an answer is assumed to be the row's own and the same for all of its
        seeds, the other half to be noise of the run.
        """
        questions = self.question_count
        noise = max(self.accuracy * (1 - self.accuracy) / 2, 1 / questions)
        known = 2 * noise / questions
        found = UncertainVariance(2 * known, max(1, questions - 1), 0.0)
        if seed_count > 1:
            each = np.ones(self.row_count)
            variances = SeedVariances(
                between_seeds=(noise + questions * self.seed_spread**2) * each,
                noise=noise * each,
                seed_count=seed_count,
                cluster_count=questions,
            )
            found = variances.variance_of_sum((0, 1), known)
        return smallest_detectable(
            PairUncertainty(
                standard_error=math.sqrt(found.variance),
                degrees_of_freedom=found.degrees_of_freedom,
                accuracy=self.accuracy,
                seed_share=found.seed_share,
                pair_count=self.pair_count or self.row_count * (self.row_count - 1) // 2,
                question_count=questions,
                seed_count=seed_count,
            )
        )


def describe_detectable(design: PlannedDesign, seed_counts: Sequence[int] = PLANNED_SEEDS) -> str:
    """Return the smallest detectable differences as words: "3.1 points with 3 seeds, ..."."""
    pictures = design.question_count
    return ", ".join(
        f"{describe_points(design.detectable_with(count), pictures)} with {count} seeds"
        for count in seed_counts
    )


def describe_points(difference: float, picture_count: int) -> str:
    """Return a detectable difference as "3.1 points", "about 31 points" for few, or "none"."""
    if difference >= UNDETECTABLE:
        return "none"
    points = 100 * difference
    return f"about {points:.0f} points" if picture_count < FEW_PICTURES else f"{points:.1f} points"
