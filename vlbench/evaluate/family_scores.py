"""The score of each family of questions, with an interval and what is right without the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

from vlbench.evaluate.heldout_questions import EvalQuestion

_NORMAL_QUANTILE = 1.959964  # of an interval of 95 %


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


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """Return Wilson's interval (1927, doi:10.1080/01621459.1927.10502953) of a share, 95 %."""
    share, square = right / count, _NORMAL_QUANTILE**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    spread = math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    half = _NORMAL_QUANTILE * spread / (1 + square / count)
    return max(0.0, middle - half), min(1.0, middle + half)
