"""Is one connector better than another? Paired differences over seeds and questions.

Every arm answers the same questions with several seeds. The difference of two arms, seed by seed
and question by question, has three parts of variance: of seeds (another run gives another model),
of questions (another set asks something else) and a rest. An interval that leaves one out is too
narrow; one that draws seeds anew from three is wrong in an unknown direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE_LEVEL = 0.95  # of intervals
STATISTICAL_POWER = 0.8  # with which the smallest detectable difference would have been found
VARIANCE_INFLATION = (
    0.2  # added to the variance, over the degrees of freedom of seeds: see `compare`
)

CorrectMatrix = NDArray[np.float64]
"""`[seeds, questions]`, 1 where the answer was right and 0 where it was wrong."""


@dataclass(frozen=True)
class PairedDifference:
    """How much better one arm is than another: shares of right answers, from -1 to 1."""

    mean: float
    interval_low: float
    """Lower end of the 95 % interval."""
    interval_high: float
    p_value: float
    """Of the hypothesis that there is no difference; two-sided."""
    standard_error: float
    """Standard error of `mean`."""
    degrees_of_freedom: float
    """Degrees of freedom: Satterthwaite's, but not more than those of the seeds."""
    smallest_detectable: float
    """Smallest difference that this design would find with probability POWER."""
    seed_count: int
    question_count: int

    def describe_difference(self, first_name: str, second_name: str) -> str:
        """Say it in plain words, in points (hundredths): `one` against `other`."""
        size = f"{abs(100 * self.mean):.1f} points"
        low, high = sorted((100 * self.interval_low, 100 * self.interval_high))
        if self.mean < 0:
            low, high = -high, -low
        word = "below" if self.mean < 0 else "above"
        found = f"95 % interval {low:.1f} to {high:.1f}"
        seeds = f"{self.seed_count} seed{'s' if self.seed_count > 1 else ''}"
        clear = "" if self.interval_low > 0 or self.interval_high < 0 else "; this may be chance"
        return f"{first_name} is {size} {word} {second_name} ({found}; {seeds}{clear})"


def paired_difference(first: CorrectMatrix, second: CorrectMatrix) -> PairedDifference:
    """Return how much better `one` is than `other`; rows are the same seeds, columns questions.

    The variance of the mean is that of seeds, questions and rest in a two-way layout with one
    value per cell. With a single seed nothing is known about seeds: the interval is then about
    questions alone.

    Satterthwaite's degrees of freedom are large just where the seeds came out alike by chance, so
    they are bounded by those of the seeds; and what seeds do to an accuracy is flatter than normal
    when it is much, so that the tails of t are a little short: FLAT makes up for it. Both were
    found by simulation (tests/test_statistics.py), where without them 6 to 8 of 100 families of
    equal arms raised an alarm at 3 seeds.

    A seed's share of right answers moves in steps of one answer, so it is known to a step at best:
    the variance of the mean is at least (1 / questions)^2 / seeds. Without this bound, seeds whose
    sums agree by accident, on different questions, would leave no variance at all: of four equal
    arms at 2 seeds and 20 questions, 22 to 34 of 100 families raised an alarm. Arms that gave the
    same answers to everything have no error.
    """
    cells = np.asarray(first, float) - np.asarray(second, float)
    if not cells.any():
        return PairedDifference(0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, *cells.shape)
    return _estimate_difference(cells)


def _estimate_difference(cells: CorrectMatrix) -> PairedDifference:
    """Return the mean of `cells` `[seeds, questions]` and what `compare` says about it."""
    seeds, questions = cells.shape
    mean = float(cells.mean())
    parts = mean_squares(cells)
    # E[between seeds] = rest + questions x seeds' variance, and so for questions: their sum less
    # the rest is what the mean's variance is made of. A negative share of either is noise.
    terms = [(parts.seeds, seeds - 1), (parts.questions, questions - 1)]
    if seeds == 1 or parts.seeds <= parts.residual < parts.questions:
        terms = terms[1:]
    elif parts.questions <= parts.residual:
        terms = terms[:1]
    else:
        terms += [(-parts.residual, (seeds - 1) * (questions - 1))]
    total = sum(value for value, _ in terms)
    freedom = float(max(1, questions - 1))
    if total > 0:
        freedom = total**2 / sum(value**2 / count for value, count in terms if value)
    total = max(total, 1 / questions)  # one answer of each seed; it is cells.size x the variance
    if seeds > 1:
        freedom, total = min(freedom, seeds - 1), total * (1 + VARIANCE_INFLATION / (seeds - 1))
    error = float(np.sqrt(total / cells.size))
    reach = float(stats.t.ppf((1 + CONFIDENCE_LEVEL) / 2, freedom))
    return PairedDifference(
        mean=mean,
        interval_low=max(-1.0, mean - reach * error),  # no difference of shares is larger than 1
        interval_high=min(1.0, mean + reach * error),
        p_value=float(2 * stats.t.sf(abs(mean) / error, freedom)),
        standard_error=error,
        degrees_of_freedom=float(freedom),
        smallest_detectable=min(
            1.0, (reach + float(stats.t.ppf(STATISTICAL_POWER, freedom))) * error
        ),
        seed_count=seeds,
        question_count=questions,
    )


@dataclass(frozen=True)
class MeanSquares:
    """Mean squares of a two-way layout with one value per cell."""

    seeds: float
    questions: float
    residual: float


def mean_squares(cells: CorrectMatrix) -> MeanSquares:
    """Return the mean squares between seeds, between questions, and of the rest."""
    seeds, questions = cells.shape
    mean = cells.mean()
    by_seed, by_question = cells.mean(axis=1), cells.mean(axis=0)
    rest = cells - by_seed[:, None] - by_question[None, :] + mean
    return MeanSquares(
        seeds=float(questions * ((by_seed - mean) ** 2).sum() / max(1, seeds - 1)),
        questions=float(seeds * ((by_question - mean) ** 2).sum() / max(1, questions - 1)),
        residual=float((rest**2).sum() / max(1, (seeds - 1) * (questions - 1))),
    )


def holm_correction(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def bootstrap_interval(
    first: CorrectMatrix, second: CorrectMatrix, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the interval of a bootstrap over seeds and questions: a cross-check, no more.

    Over three seeds it covers the truth in 73 to 99 of 100 cases, depending on what seeds do.
    """
    cells = np.asarray(first, float) - np.asarray(second, float)
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    for draw in range(draws):
        rows = rng.integers(0, cells.shape[0], cells.shape[0])
        columns = rng.integers(0, cells.shape[1], cells.shape[1])
        means[draw] = cells[np.ix_(rows, columns)].mean()
    low, high = np.quantile(means, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2])
    return float(low), float(high)


def accuracy_interval(correct: CorrectMatrix) -> tuple[float, float, float]:
    """Return the accuracy of one arm and its 95 % interval, by the same parts of variance."""
    found = _estimate_difference(np.asarray(correct, float))
    return found.mean, max(0.0, found.interval_low), min(1.0, found.interval_high)
