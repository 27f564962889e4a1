"""Pairs of rows whose difference is tested, with p-values corrected within their family."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vlbench.compare.report.detectable_difference import SIGNIFICANCE_LEVEL, describe_points
from vlbench.compare.report.paired_statistics import (
    PairedDifference,
    RowStatistics,
    holm_correction,
)

MAX_NAMED_ROWS = 4  # a sentence about more rows gives their number instead of names


@dataclass(frozen=True)
class RowPair:
    """The difference of two rows of a comparison, the better one first."""

    better: str
    worse: str
    difference: PairedDifference
    corrected_p: float
    """After Holm's correction over all pairs of the family."""
    pair_count: int
    """The number of these pairs."""

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes 0 and the corrected p is small enough.

        With one seed that is said of two runs, not of their rows.
        """
        return self.difference.interval_low > 0 and self.corrected_p <= SIGNIFICANCE_LEVEL

    @property
    def corrected_p_text(self) -> str:
        """The corrected p with a relation sign: "= 0.012" or "< 0.001"."""
        return format_p(self.corrected_p)

    def short_sentence(self) -> str:
        """Return the difference as a sentence."""
        caution = (
            ", so this may be chance"
            if self.difference.interval_low > 0 and self.corrected_p > SIGNIFICANCE_LEVEL
            else ""
        )
        return (
            f"{self.difference.describe_difference(self.better, self.worse)}; p "
            f"{self.corrected_p_text} after Holm's "
            f"correction over {format_count(self.pair_count, 'pair')}{caution}."
        )

    def full_sentence(self) -> str:
        """Return the short sentence with the smallest detectable difference."""
        difference = self.difference
        smallest = describe_points(
            difference.smallest_detectable, difference.uncertainty.question_count
        )
        return f"{self.short_sentence()} Smallest detectable difference of this design: {smallest}."


def all_pairs(row_count: int) -> list[tuple[int, int]]:
    """Return every pair of rows by their numbers, the first with the second first."""
    return list(itertools.combinations(range(row_count), 2))


def compare_pairs(
    names: Sequence[str], statistics: RowStatistics, family: Iterable[tuple[int, int]]
) -> list[RowPair]:
    """Return the differences of pairs of rows, given by their numbers, in the order of the family.

    p-values are corrected for the number of pairs by Holm's method.
    """
    pairs = [
        pair if statistics.accuracies[pair[0]] >= statistics.accuracies[pair[1]] else pair[::-1]
        for pair in family
    ]
    differences = [
        statistics.difference(better, worse, pair_count=len(pairs)) for better, worse in pairs
    ]
    corrected_ps = holm_correction([difference.p_value for difference in differences])
    return [
        RowPair(names[better], names[worse], difference, corrected_p, pair_count=len(pairs))
        for (better, worse), difference, corrected_p in zip(
            pairs, differences, corrected_ps, strict=True
        )
    ]


def format_p(p_value: float) -> str:
    """Return p with a relation sign: "= 0.012" or "< 0.001"."""
    return f"= {p_value:.3f}" if p_value >= 0.001 else "< 0.001"


def format_count(count: int, noun: str) -> str:
    """Return "1 seed" or "3 seeds"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def join_names(names: Sequence[str], conjunction: str) -> str:
    """Return "a, b and c"; "N others" for more than `MAX_NAMED_ROWS`."""
    if len(names) > MAX_NAMED_ROWS:
        return f"{len(names)} others"
    return join_words(names, conjunction)


def join_words(words: Sequence[str], conjunction: str) -> str:
    """Return "a, b and c"."""
    return f" {conjunction} ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
