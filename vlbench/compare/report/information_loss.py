"""Where the information for wrong answers went, from the information.json of finished runs.

A wrong answer is put down to the last place that has what it rests on: information that can be read
behind the connector was in the encoder too, whether or not a linear probe reads it there. How far
the probes of a place can be trusted, right answers show: what they rest on has passed every place.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from vlbench.compare.report.analysis import ComparisonResult, RowResult
from vlbench.compare.report.finished_runs import cluster_numbers
from vlbench.compare.report.paired_statistics import CONFIDENCE_LEVEL, RowStatistics
from vlbench.compare.report.run_probes import PLACE_LABELS, RunProbes, load_run_probes

LOSSES = (
    "not in the encoder",
    "lost in the connector",
    "lost in the language model",
    "there but not used",
    "not attributed",
)
"""Where the information for a wrong answer went, by the number of places that still have it; last
those of which that is not known."""
NOT_ATTRIBUTED = len(LOSSES) - 1
LOST_IN_CONNECTOR = 1
UNSURE = (
    "the connector's tokens have no places, and probes of all tokens at once do not read it in the "
    "encoder either"
)
MIN_RIGHT_ANSWERS = 20  # with fewer, they do not show whether probes can be trusted
TRUSTED_SHARE = 0.8  # of right answers, read behind the connector
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
    """A family or type of question, or ALL_KINDS."""
    question_count: int
    read: tuple[ShareEstimate, ...]
    """For each place, the share of probed questions whose evidence its probes read right; () where
    none is probed in all runs."""
    read_of_right: tuple[float, ...]
    """The same share of those that were answered right; () where they are too few."""
    by_chance: float
    """The same share for the control probes, of the place where it is largest."""
    wrong_count: int
    """Wrong answers of all seeds."""
    losses: tuple[LossCount, ...]
    """In the order of LOSSES."""

    @property
    def is_trusted(self) -> bool:
        """Whether probes behind the connector read most of what right answers rest on."""
        return not self.read_of_right or self.read_of_right[LOST_IN_CONNECTOR] >= TRUSTED_SHARE

    @property
    def missed_count(self) -> int:
        """Wrong answers lost in the connector of which its probes may have missed what is there.

        That is so if they read as large a share of what is there as they do of right answers.
        """
        share = self.read_of_right[LOST_IN_CONNECTOR] if self.read_of_right else 1.0
        lost = self.losses[LOST_IN_CONNECTOR].answers
        behind = sum(one.answers for one in self.losses[LOST_IN_CONNECTOR + 1 : NOT_ATTRIBUTED])
        return min(lost, round(behind / share - behind)) if share else lost


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
    training_pictures: Mapping[str, int]
    """By families of questions."""
    reads_answers: bool
    """Whether the language model's probes read answers instead of labels of pictures."""
    not_attributed: Mapping[str, int]
    """Reason -> wrong answers of all seeds that are not attributed for it."""


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
    is_probed: NDArray[np.bool_]
    """`[rows, seeds, questions]`"""
    is_unsure: NDArray[np.bool_]
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

    Rows of which a run has no probes are left out; of the others all have the same questions, and
    answers to those that a run has not probed are not attributed.
    """
    names = findings.question_ids
    probes: dict[str, list[RunProbes]] = {}
    missing: dict[str, str] = {}
    for row in findings.rows:
        loaded = [load_run_probes(run) for run in row.runs]
        reason = next((one for one in loaded if isinstance(one, str)), "")
        if reason:
            missing[row.name] = reason
        else:
            probes[row.name] = [one for one in loaded if not isinstance(one, str)]
    rows = [row for row in findings.rows if row.name in probes]
    if not any(name in one.read for runs in probes.values() for one in runs for name in names):
        return InformationLoss((), missing)
    answers = _join_answers(rows, probes, names)
    kinds = [_analyze_kind(answers, kind) for kind in answers.columns_of_kind]
    losses = _attribute(answers)
    return InformationLoss(
        tuple(
            _row_information(
                row.name,
                probes[row.name],
                [kind[index] for kind in kinds],
                _count_reasons(losses[index] == NOT_ATTRIBUTED, probes[row.name], names),
            )
            for index, row in enumerate(rows)
        ),
        missing,
    )


def _join_answers(
    rows: Sequence[RowResult],
    probes: Mapping[str, Sequence[RunProbes]],
    names: Sequence[str],
) -> _ProbedAnswers:
    first_run = rows[0].runs[0]
    kinds = [first_run.families.get(one) or first_run.types_and_languages[one][0] for one in names]
    columns_of_kind = {ALL_KINDS: list(range(len(names)))}
    for kind in filter(None, dict.fromkeys(kinds)):
        columns_of_kind[kind] = [at for at, one in enumerate(kinds) if one == kind]
    runs = [probes[row.name] for row in rows]
    unread = [False] * len(PLACE_LABELS)
    return _ProbedAnswers(
        correct=np.stack([row.correct for row in rows]).astype(bool),
        read=np.array(
            [[[run.read.get(one, unread) for one in names] for run in of] for of in runs]
        ),
        control=np.array(
            [[[run.control.get(one, unread) for one in names] for run in of] for of in runs]
        ),
        is_probed=np.array([[[one in run.read for one in names] for run in of] for of in runs]),
        is_unsure=np.array([[[one in run.unsure for one in names] for run in of] for of in runs]),
        clusters=cluster_numbers([run for row in rows for run in row.runs], names),
        columns_of_kind=columns_of_kind,
    )


def _analyze_kind(answers: _ProbedAnswers, kind: str) -> list[KindInformation]:
    """Return for each row what its probes read for one kind of question."""
    columns = list(answers.columns_of_kind[kind])
    probed = [at for at in columns if answers.is_probed[:, :, at].all()]
    places = range(answers.read.shape[-1]) if probed else ()
    read = [answers.estimates(answers.read[..., place], probed) for place in places]
    losses = _attribute(answers)
    events = [losses == number for number in range(len(LOSSES))]
    shares = [answers.estimates(event, columns) for event in events]
    return [
        KindInformation(
            kind=kind,
            question_count=len(columns),
            read=tuple(place[row] for place in read),
            read_of_right=_read_of_right(answers, row, probed),
            by_chance=float(answers.control[row][:, probed].mean((0, 1)).max()) if probed else 0.0,
            wrong_count=int((~answers.correct[row][:, columns]).sum()),
            losses=tuple(
                LossCount(int(event[row][:, columns].sum()), share[row])
                for event, share in zip(events, shares, strict=True)
            ),
        )
        for row in range(len(answers.correct))
    ]


def _read_of_right(answers: _ProbedAnswers, row: int, columns: list[int]) -> tuple[float, ...]:
    """Return for each place the share that is read of a row's right answers, () for too few."""
    is_right = answers.correct[row][:, columns]
    if is_right.sum() < MIN_RIGHT_ANSWERS:
        return ()
    return tuple(float(one) for one in answers.read[row][:, columns][is_right].mean(0))


def _attribute(answers: _ProbedAnswers) -> NDArray[np.int64]:
    """Return the index into LOSSES for each wrong answer, -1 for a right one.

    The result is `[rows, seeds, questions]`.
    """
    losses = losses_of_answers(answers.correct, answers.read)
    unknown = ~answers.is_probed | (answers.is_unsure & (losses == LOST_IN_CONNECTOR))
    return np.where(unknown & ~answers.correct, NOT_ATTRIBUTED, losses)


def _count_reasons(
    not_attributed: NDArray[np.bool_], runs: Sequence[RunProbes], names: Sequence[str]
) -> dict[str, int]:
    """Return why answers `[seeds, questions]` of a row are not attributed, and how many of each."""
    return dict(
        Counter(
            UNSURE if names[at] in run.read else run.not_probed.get(names[at], "no probes")
            for run, of_run in zip(runs, not_attributed, strict=True)
            for at in np.flatnonzero(of_run).tolist()
        )
    )


def losses_of_answers(correct: NDArray[np.bool_], read: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the index into LOSSES for each wrong answer, -1 for a right one.

    `correct` is `[...]`, `read` `[..., places]`. It is the number of the last place that has the
    information, counted from 1; 0 where none has it.
    """
    places = np.arange(1, read.shape[-1] + 1)
    last_place: NDArray[np.int64] = (read * places).max(-1)
    return np.where(correct, -1, last_place)


def _row_information(
    name: str,
    runs: Sequence[RunProbes],
    kinds: Sequence[KindInformation],
    not_attributed: Mapping[str, int],
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
        not_attributed=not_attributed,
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
