"""Questions that one row of a comparison answers and another one does not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from vlbench.compare.findings import Row

SHOWN = 6  # questions, each way
OTHERS = 3  # rows that the best one is set against


@dataclass(frozen=True)
class Answers:
    """What a row answered to a question, in the order of the seeds."""

    row: str
    said: list[tuple[str, list[bool]]]
    """An answer and, for each of the seeds in a row that gave it, whether it was right."""


@dataclass(frozen=True)
class Case:
    """A question on which two rows part."""

    id: str
    truth: str
    kind: str
    """Its type and language."""
    answers: tuple[Answers, Answers]
    """Of the row that is right, and of the other."""


@dataclass(frozen=True)
class Cases:
    """Questions that `winner` gets right in most seeds and `loser` wrong in most."""

    winner: str
    loser: str
    count: int
    """How many there are in all."""
    shown: list[Case]


def wins_and_losses(rows: Sequence[Row], questions: Sequence[str]) -> list[Cases]:
    """Return the cases of the best row against each of the next ones, both ways."""
    best = rows[0]
    return [
        one
        for other in rows[1 : 1 + OTHERS]
        for one in (cases(best, other, questions), cases(other, best, questions))
    ]


def cases(winner: Row, loser: Row, questions: Sequence[str]) -> Cases:
    """Return where `winner` is right and `loser` wrong in most seeds, the clearest first."""
    won, lost = winner.right.mean(axis=0), loser.right.mean(axis=0)
    parted = [index for index in range(len(questions)) if won[index] > 0.5 > lost[index]]
    parted.sort(key=lambda index: lost[index] - won[index])
    shown = [_case(winner, loser, questions[index]) for index in parted[:SHOWN]]
    return Cases(winner.name, loser.name, len(parted), shown)


def _case(winner: Row, loser: Row, question: str) -> Case:
    first = winner.runs[0]
    return Case(
        id=question,
        truth=first.texts[question][1],
        kind=", ".join(part for part in first.kinds[question] if part),
        answers=(_answers(winner, question), _answers(loser, question)),
    )


def _answers(row: Row, question: str) -> Answers:
    each = [(run.texts[question][0], run.right[question]) for run in row.runs]
    alike = itertools.groupby(each, key=lambda one: one[0])
    return Answers(row.name, [(text, [right for _, right in ones]) for text, ones in alike])
