"""Where the information for wrong answers went, from the information.json of finished runs.

A wrong answer is put down to the last place that has what it rests on: information that can be read
behind the connector was in the encoder too, whether or not a linear probe reads it there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from vlbench.compare.report.analysis import ComparisonResult, RowResult
from vlbench.compare.report.finished_runs import cluster_numbers
from vlbench.compare.report.paired_statistics import CONFIDENCE_LEVEL, RowStatistics
from vlbench.compare.report.run_probes import RunProbes, load_run_probes

LOSSES = (
    "not in the encoder",
    "lost in the connector",
    "lost in the language model",
    "there but not used",
)
"""Where the information for a wrong answer went, by the number of places that still have it."""
ALL_KINDS = "all"


class ShareEstimate(NamedTuple):
    """A share with the ends of its 95 % interval."""

    share: float
    low: float
    high: float


class LossCount(NamedTuple):
    """How many wrong answers are put down to one loss."""

    answers: int
    """Of all seeds."""
    of_questions: ShareEstimate
    """Their share of all questions."""


@dataclass(frozen=True)
class KindInformation:
    """What the probes of a row read for one kind of question."""

    kind: str
    """A type of question, or ALL_KINDS."""
    question_count: int
    read: tuple[ShareEstimate, ...]
    """For each place, the share of questions whose evidence its probes read right."""
    by_chance: float
    """The same share for the control probes, of the place where it is largest."""
    wrong_count: int
    """Wrong answers of all seeds."""
    losses: tuple[LossCount, ...]
    """In the order of LOSSES."""


@dataclass(frozen=True)
class RowInformation:
    """What the probes of a row read, and how its connector rearranges pictures."""

    row_name: str
    kinds: tuple[KindInformation, ...]
    """All questions first, then each kind."""
    neighbours: ShareEstimate
    """Overlap of the nearest pictures before and behind the connector."""
    neighbours_by_chance: float
    neighbour_count: int
    training_pictures: int
    reads_answers: bool
    """Whether the language model's probes read answers instead of labels of pictures."""


@dataclass(frozen=True)
class InformationLoss:
    """The probes of all rows that have them."""

    rows: tuple[RowInformation, ...]
    missing: dict[str, str]
    """Name of a row without probes -> why."""


class _ProbedAnswers(NamedTuple):
    """Answers and readings of all rows that have probes, for the same questions."""

    correct: NDArray[np.bool_]
    """`[rows, seeds, questions]`"""
    read: NDArray[np.bool_]
    """`[rows, seeds, questions, places]`"""
    control: NDArray[np.bool_]
    clusters: NDArray[np.int64]
    """`[questions]`"""
    columns_of_kind: Mapping[str, Sequence[int]]

    def estimates(self, events: NDArray[np.bool_], columns: Sequence[int]) -> list[ShareEstimate]:
        """Return for each row the share of some questions in which an event occurs."""
        statistics = RowStatistics(events.astype(float), self.clusters).of_questions(columns)
        rows = range(statistics.row_count)
        return [ShareEstimate(*statistics.accuracy_interval(row)) for row in rows]


def find_information_loss(findings: ComparisonResult) -> InformationLoss:
    """Return where the information for the rows' wrong answers went.

    Rows of which a run has no probes are left out; of the others all have the same questions.
    """
    probes: dict[str, list[RunProbes]] = {}
    missing: dict[str, str] = {}
    for row in findings.rows:
        loaded = [load_run_probes(run) for run in row.runs]
        reason = next((one for one in loaded if isinstance(one, str)), "")
        if reason:
            missing[row.name] = reason
        else:
            probes[row.name] = [one for one in loaded if not isinstance(one, str)]
    known = [one.read for runs in probes.values() for one in runs]
    columns = [
        column
        for column, name in enumerate(findings.question_ids)
        if known and all(name in read for read in known)
    ]
    if not columns:
        return InformationLoss((), missing)
    rows = [row for row in findings.rows if row.name in probes]
    answers = _join_answers(rows, probes, [findings.question_ids[at] for at in columns], columns)
    kinds = [_analyze_kind(answers, kind) for kind in answers.columns_of_kind]
    return InformationLoss(
        tuple(
            _row_information(row.name, probes[row.name], [kind[index] for kind in kinds])
            for index, row in enumerate(rows)
        ),
        missing,
    )


def _join_answers(
    rows: Sequence[RowResult],
    probes: Mapping[str, Sequence[RunProbes]],
    names: Sequence[str],
    columns: Sequence[int],
) -> _ProbedAnswers:
    first_run = rows[0].runs[0]
    types = [first_run.types_and_languages[name][0] for name in names]
    columns_of_kind = {ALL_KINDS: list(range(len(names)))}
    for kind in sorted(filter(None, set(types))):
        columns_of_kind[kind] = [at for at, one in enumerate(types) if one == kind]
    return _ProbedAnswers(
        correct=np.stack([row.correct[:, list(columns)] for row in rows]).astype(bool),
        read=np.array(
            [[[run.read[one] for one in names] for run in probes[row.name]] for row in rows]
        ),
        control=np.array(
            [[[run.control[one] for one in names] for run in probes[row.name]] for row in rows]
        ),
        clusters=cluster_numbers(first_run, names),
        columns_of_kind=columns_of_kind,
    )


def _analyze_kind(answers: _ProbedAnswers, kind: str) -> list[KindInformation]:
    """Return for each row what its probes read for one kind of question."""
    columns = list(answers.columns_of_kind[kind])
    places = range(answers.read.shape[-1])
    read = [answers.estimates(answers.read[..., place], columns) for place in places]
    by_chance = answers.control[:, :, columns].mean((1, 2)).max(-1)
    losses = losses_of_answers(answers.correct, answers.read)
    events = [losses == number for number in range(len(LOSSES))]
    shares = [answers.estimates(event, columns) for event in events]
    return [
        KindInformation(
            kind=kind,
            question_count=len(columns),
            read=tuple(place[row] for place in read),
            by_chance=float(by_chance[row]),
            wrong_count=int((~answers.correct[row][:, columns]).sum()),
            losses=tuple(
                LossCount(int(event[row][:, columns].sum()), share[row])
                for event, share in zip(events, shares, strict=True)
            ),
        )
        for row in range(len(answers.correct))
    ]


def losses_of_answers(correct: NDArray[np.bool_], read: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the index into LOSSES for each wrong answer, -1 for a right one.

    `correct` is `[...]`, `read` `[..., places]`. It is the number of the last place that has the
    information, counted from 1; 0 where none has it.
    """
    places = np.arange(1, read.shape[-1] + 1)
    last_place: NDArray[np.int64] = (read * places).max(-1)
    return np.where(correct, -1, last_place)


def _row_information(
    name: str, runs: Sequence[RunProbes], kinds: Sequence[KindInformation]
) -> RowInformation:
    return RowInformation(
        row_name=name,
        kinds=tuple(kinds),
        neighbours=_mean_overlap(
            [run.neighbours["overlap"] for run in runs],
            [run.neighbours["standard_error"] for run in runs],
        ),
        neighbours_by_chance=runs[0].neighbours["chance"],
        neighbour_count=int(runs[0].neighbours["count"]),
        training_pictures=runs[0].training_pictures,
        reads_answers=runs[0].reads_answers,
    )


def _mean_overlap(overlaps: Sequence[float], errors: Sequence[float]) -> ShareEstimate:
    """Return the mean over seeds with its interval, over pictures and, with several, seeds.

    The pictures are the same for all seeds, so their error is not averaged out.
    """
    mean, error, degrees = float(np.mean(overlaps)), float(np.mean(errors)), math.inf
    if len(overlaps) > 1:
        error = math.hypot(error, float(np.std(overlaps, ddof=1)) / math.sqrt(len(overlaps)))
        degrees = len(overlaps) - 1
    reach = error * float(stdtrit(degrees, (1 + CONFIDENCE_LEVEL) / 2))
    return ShareEstimate(mean, max(0.0, mean - reach), min(1.0, mean + reach))
