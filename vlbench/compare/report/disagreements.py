"""Questions that one row of a comparison answers and another one does not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from vlbench.compare.report.analysis import RowResult

MAX_QUESTIONS_SHOWN = 6  # questions, each way
MAX_OPPONENTS = 3  # rows that the best one is set against


@dataclass(frozen=True)
class RowAnswers:
    """What a row answered to a question, in the order of the seeds."""

    row_name: str
    grouped_answers: list[tuple[str, list[bool]]]
    """An answer and, for each of the seeds in a row that gave it, whether it was right."""


@dataclass(frozen=True)
class QuestionDisagreement:
    """A question on which two rows part."""

    question_id: str
    truth: str
    type_and_language: str
    """Its type and language."""
    answers: tuple[RowAnswers, RowAnswers]
    """Of the row that is right, and of the other."""


@dataclass(frozen=True)
class RowDisagreements:
    """Questions that `winner` gets right in most seeds and `loser` wrong in most."""

    winner: str
    loser: str
    count: int
    """How many there are in all."""
    shown: list[QuestionDisagreement]


def wins_and_losses(rows: Sequence[RowResult], questions: Sequence[str]) -> list[RowDisagreements]:
    """Return the cases of the best row against each of the next ones, both ways."""
    best = rows[0]
    return [
        one
        for other in rows[1 : 1 + MAX_OPPONENTS]
        for one in (
            find_disagreements(best, other, questions),
            find_disagreements(other, best, questions),
        )
    ]


def find_disagreements(
    winner: RowResult, loser: RowResult, questions: Sequence[str]
) -> RowDisagreements:
    """Return where `winner` is right and `loser` wrong in most seeds, the clearest first."""
    won, lost = winner.correct.mean(axis=0), loser.correct.mean(axis=0)
    parted = [index for index in range(len(questions)) if won[index] > 0.5 > lost[index]]
    parted.sort(key=lambda index: lost[index] - won[index])
    shown = [
        _make_disagreement(winner, loser, questions[index])
        for index in parted[:MAX_QUESTIONS_SHOWN]
    ]
    return RowDisagreements(winner.name, loser.name, len(parted), shown)


def _make_disagreement(
    winner: RowResult, loser: RowResult, question_id: str
) -> QuestionDisagreement:
    first = winner.runs[0]
    return QuestionDisagreement(
        question_id=question_id,
        truth=first.answers_and_truths[question_id][1],
        type_and_language=", ".join(
            part for part in first.types_and_languages[question_id] if part
        ),
        answers=(_group_answers(winner, question_id), _group_answers(loser, question_id)),
    )


def _group_answers(row: RowResult, question_id: str) -> RowAnswers:
    each = [(run.answers_and_truths[question_id][0], run.correct[question_id]) for run in row.runs]
    alike = itertools.groupby(each, key=lambda one: one[0])
    return RowAnswers(row.name, [(text, [right for _, right in ones]) for text, ones in alike])
