"""Which of two models is chosen more often? Votes of pairs, with intervals and exact tests.

Votes about one picture are not independent: an answer that is good there wins all of them. As in a
comparison of runs the picture is the unit (`question_clusters`): intervals are Wilson's for as many
votes as these are worth, and the test is the exact sign test over pictures.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from vlbench.compare.report.detectable_difference import SIGNIFICANCE_LEVEL
from vlbench.compare.report.paired_statistics import RowStatistics, holm_correction
from vlbench.compare.report.proportion_interval import sign_test
from vlbench.compare.report.question_clusters import number_clusters, sum_clusters
from vlbench.compare.report.vote_records import BAD, TIE, Vote, VoteFiles


@dataclass(frozen=True)
class VoteShare:
    """In how many of some votes something was chosen, with its 95 % interval."""

    count: int
    votes: int
    pictures: int
    """What the votes are about: the number of independent units."""
    interval_low: float
    interval_high: float
    p_value: float
    """Two-sided and exact, of the null hypothesis that either outcome is as likely."""

    @property
    def share(self) -> float | None:
        """From 0 to 1; None without votes."""
        return self.count / self.votes if self.votes else None


@dataclass(frozen=True)
class PairVotes:
    """The votes on two models, the one with more wins first."""

    better: str
    worse: str
    wins: VoteShare
    """Of `better`, among the votes that decided between the two."""
    ties: int
    both_bad: int
    shown_together: int
    """All votes with both, those that another model won included."""
    shown_first: int
    """In how many of these `better` was shown before `worse`."""
    corrected_p: float
    """After Holm's correction over all pairs."""
    pair_count: int

    @property
    def losses(self) -> int:
        """How many votes `worse` won."""
        return self.wins.votes - self.wins.count

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes one half and the corrected p is small enough."""
        return self.wins.interval_low > 0.5 and self.corrected_p <= SIGNIFICANCE_LEVEL


@dataclass(frozen=True)
class VoteFindings:
    """What votes say."""

    files: VoteFiles
    pairs: list[PairVotes]
    """Of blind votes."""
    seen_pairs: list[PairVotes]
    """Of votes whose voter saw the names of the models."""
    first_chosen: dict[int, VoteShare]
    """Number of answers shown at once -> how often a blind vote chose the first of them."""

    @property
    def blind_count(self) -> int:
        """Number of blind votes."""
        return sum(vote.blind for vote in self.files.votes)


def analyze_votes(files: VoteFiles) -> VoteFindings:
    """Return wins, intervals and tests of every pair of models, and how position matters."""
    clusters = _picture_numbers(files.votes)
    numbered = list(zip(files.votes, clusters.tolist(), strict=True))
    blind = [one for one in numbered if one[0].blind]
    shown_counts = sorted({len(vote.models) for vote, _ in blind if vote.is_decided})
    return VoteFindings(
        files=files,
        pairs=_compare_pairs(blind),
        seen_pairs=_compare_pairs([one for one in numbered if not one[0].blind]),
        first_chosen={
            count: vote_share(
                [
                    (vote.is_first_chosen, cluster)
                    for vote, cluster in blind
                    if vote.is_decided and len(vote.models) == count
                ]
            )
            for count in shown_counts
        },
    )


def vote_share(outcomes: Sequence[tuple[bool, int]]) -> VoteShare:
    """Return the share of outcomes that are true; each comes with the number of its picture."""
    if not outcomes:
        return VoteShare(0, 0, 0, 0.0, 1.0, 1.0)
    chosen = np.array([outcome for outcome, _ in outcomes], dtype=float)
    clusters = number_clusters([cluster for _, cluster in outcomes])
    statistics = RowStatistics(chosen[None, None], clusters)
    _, low, high = statistics.accuracy_interval(0)
    p_value = sign_test(sum_clusters(2 * chosen - 1, clusters))
    return VoteShare(int(chosen.sum()), len(outcomes), statistics.cluster_count, low, high, p_value)


def _compare_pairs(numbered: Sequence[tuple[Vote, int]]) -> list[PairVotes]:
    """Return all pairs of models that were shown together, the surest first."""
    names = {
        names for vote, _ in numbered for names in itertools.combinations(sorted(vote.models), 2)
    }
    pairs = [_count_pair(one, other, numbered) for one, other in sorted(names)]
    corrected = holm_correction([pair.wins.p_value for pair in pairs])
    pairs = [
        replace(pair, corrected_p=p, pair_count=len(pairs))
        for pair, p in zip(pairs, corrected, strict=True)
    ]
    return sorted(pairs, key=lambda pair: pair.wins.p_value)


def _count_pair(one: str, other: str, numbered: Sequence[tuple[Vote, int]]) -> PairVotes:
    """Return the votes on two models; where more were shown, the best one wins against each."""
    both = [(vote, cluster) for vote, cluster in numbered if {one, other} <= set(vote.models)]
    winners = [
        (vote.models[vote.choice], cluster)
        for vote, cluster in both
        if isinstance(vote.choice, int)
    ]
    won = Counter(name for name, _ in winners)
    better, worse = (one, other) if won[one] >= won[other] else (other, one)
    undecided = Counter(vote.choice for vote, _ in both)
    return PairVotes(
        better=better,
        worse=worse,
        wins=vote_share(
            [(name == better, cluster) for name, cluster in winners if name in (better, worse)]
        ),
        ties=undecided[TIE],
        both_bad=undecided[BAD],
        shown_together=len(both),
        shown_first=sum(vote.models.index(better) < vote.models.index(worse) for vote, _ in both),
        corrected_p=1.0,
        pair_count=1,
    )


def _picture_numbers(votes: Sequence[Vote]) -> NDArray[np.int64]:
    """Return a number for each vote `[votes]`, the same for votes that share a picture.

    That is also so where a third vote has a picture of each. A vote without a picture goes with
    those of the same question.
    """
    names = [vote.image_sha256 or [f"question {vote.question}"] for vote in votes]
    edges = [(number, name) for number, some in enumerate(names) for name in some]
    pictures = number_clusters([name for _, name in edges]) + len(votes)
    size = int(pictures.max()) + 1
    rows = [number for number, _ in edges]
    graph = coo_array((np.ones(len(edges)), (rows, pictures)), shape=(size, size))
    _, labels = connected_components(graph, directed=False)
    return number_clusters(labels[: len(votes)].tolist())
