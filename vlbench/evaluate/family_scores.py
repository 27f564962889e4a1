"""The score of each family of questions, with an interval and what is right without the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from vlbench.evaluate.heldout_questions import EvalQuestion
from vlbench.evaluate.tasks.score_report import wilson_interval


class FamilyScore(TypedDict):
    """How one family of questions was answered."""

    accuracy: float
    interval: tuple[float, float]  # Wilson's, 95 %: over questions, for this one run
    blank_accuracy: float  # with blank images
    questions: int


def score_families(
    questions: Sequence[EvalQuestion], answers: Sequence[str], blank_answers: Sequence[str]
) -> dict[str, FamilyScore]:
    """Return the exact-match score of each family, in the order of the questions; {} for none."""
    rows: dict[str, list[tuple[bool, bool]]] = {}
    for question, answer, blank in zip(questions, answers, blank_answers, strict=True):
        if question.family:
            right = answer == question.answer, blank == question.answer
            rows.setdefault(question.family, []).append(right)
    return {
        family: FamilyScore(
            accuracy=sum(right for right, _ in found) / len(found),
            interval=wilson_interval(sum(right for right, _ in found), len(found)),
            blank_accuracy=sum(blank for _, blank in found) / len(found),
            questions=len(found),
        )
        for family, found in rows.items()
    }
