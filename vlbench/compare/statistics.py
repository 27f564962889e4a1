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

LEVEL = 0.95  # of intervals
POWER = 0.8  # with which the smallest detectable difference would have been found
FLAT = 0.2  # added to the variance, over the degrees of freedom of seeds: see `compare`

Right = NDArray[np.float64]
"""`[seeds, questions]`, 1 where the answer was right and 0 where it was wrong."""


@dataclass(frozen=True)
class Difference:
    """How much better one arm is than another: shares of right answers, from -1 to 1."""

    mean: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    p: float
    """Of the hypothesis that there is no difference; two-sided."""
    error: float
    """Standard error of `mean`."""
    freedom: float
    """Degrees of freedom: Satterthwaite's, but not more than those of the seeds."""
    detectable: float
    """Smallest difference that this design would find with probability POWER."""
    seeds: int
    questions: int

    def sentence(self, one: str, other: str) -> str:
        """Say it in plain words, in points (hundredths): `one` against `other`."""
        size = f"{abs(100 * self.mean):.1f} points"
        low, high = sorted((100 * self.low, 100 * self.high))
        if self.mean < 0:
            low, high = -high, -low
        word = "below" if self.mean < 0 else "above"
        found = f"95 % interval {low:.1f} to {high:.1f}"
        seeds = f"{self.seeds} seed{'s' if self.seeds > 1 else ''}"
        clear = "" if self.low > 0 or self.high < 0 else "; this may be chance"
        return f"{one} is {size} {word} {other} ({found}; {seeds}{clear})"


def compare(one: Right, other: Right) -> Difference:
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
    cells = np.asarray(one, float) - np.asarray(other, float)
    if not cells.any():
        return Difference(0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, *cells.shape)
    return _difference(cells)


def _difference(cells: Right) -> Difference:
    """Return the mean of `cells` `[seeds, questions]` and what `compare` says about it."""
    seeds, questions = cells.shape
    mean = float(cells.mean())
    parts = mean_squares(cells)
    # E[between seeds] = rest + questions x seeds' variance, and so for questions: their sum less
    # the rest is what the mean's variance is made of. A negative share of either is noise.
    terms = [(parts.seeds, seeds - 1), (parts.questions, questions - 1)]
    if seeds == 1 or parts.seeds <= parts.rest < parts.questions:
        terms = terms[1:]
    elif parts.questions <= parts.rest:
        terms = terms[:1]
    else:
        terms += [(-parts.rest, (seeds - 1) * (questions - 1))]
    total = sum(value for value, _ in terms)
    freedom = float(max(1, questions - 1))
    if total > 0:
        freedom = total**2 / sum(value**2 / count for value, count in terms if value)
    total = max(total, 1 / questions)  # one answer of each seed; it is cells.size x the variance
    if seeds > 1:
        freedom, total = min(freedom, seeds - 1), total * (1 + FLAT / (seeds - 1))
    error = float(np.sqrt(total / cells.size))
    reach = float(stats.t.ppf((1 + LEVEL) / 2, freedom))
    return Difference(
        mean=mean,
        low=max(-1.0, mean - reach * error),  # no difference of shares is larger than 1
        high=min(1.0, mean + reach * error),
        p=float(2 * stats.t.sf(abs(mean) / error, freedom)),
        error=error,
        freedom=float(freedom),
        detectable=min(1.0, (reach + float(stats.t.ppf(POWER, freedom))) * error),
        seeds=seeds,
        questions=questions,
    )


@dataclass(frozen=True)
class MeanSquares:
    """Mean squares of a two-way layout with one value per cell."""

    seeds: float
    questions: float
    rest: float


def mean_squares(cells: Right) -> MeanSquares:
    """Return the mean squares between seeds, between questions, and of the rest."""
    seeds, questions = cells.shape
    mean = cells.mean()
    by_seed, by_question = cells.mean(axis=1), cells.mean(axis=0)
    rest = cells - by_seed[:, None] - by_question[None, :] + mean
    return MeanSquares(
        seeds=float(questions * ((by_seed - mean) ** 2).sum() / max(1, seeds - 1)),
        questions=float(seeds * ((by_question - mean) ** 2).sum() / max(1, questions - 1)),
        rest=float((rest**2).sum() / max(1, (seeds - 1) * (questions - 1))),
    )


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979), in the order given."""
    order = sorted(range(len(values)), key=values.__getitem__)
    corrected, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = largest
    return corrected


def bootstrap(one: Right, other: Right, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Return the interval of a bootstrap over seeds and questions: a cross-check, no more.

    Over three seeds it covers the truth in 73 to 99 of 100 cases, depending on what seeds do.
    """
    cells = np.asarray(one, float) - np.asarray(other, float)
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    for draw in range(draws):
        rows = rng.integers(0, cells.shape[0], cells.shape[0])
        columns = rng.integers(0, cells.shape[1], cells.shape[1])
        means[draw] = cells[np.ix_(rows, columns)].mean()
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def interval(right: Right) -> tuple[float, float, float]:
    """Return the accuracy of one arm and its 95 % interval, by the same parts of variance."""
    found = _difference(np.asarray(right, float))
    return found.mean, max(0.0, found.low), min(1.0, found.high)
