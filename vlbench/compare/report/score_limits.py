"""Floor and ceiling: scores that leave no room for a difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

CEILING = 0.97
"""Accuracy from which on errors are so few that better rows hardly show."""


class RowScore(NamedTuple):
    """The score of a row, and that of the same questions with a blank image."""

    name: str
    accuracy: float
    interval_low: float
    blank_accuracy: float | None


def floor_and_ceiling_warnings(
    scores: Sequence[RowScore], kinds: Sequence[tuple[str, Sequence[float]]]
) -> list[str]:
    """Return sentences on rows and kinds of questions that cannot tell rows apart.

    `kinds` are names of kinds of questions with the accuracy of every row.
    """
    floor = [
        f"{score.name} ({score.accuracy:.1%}, blank {score.blank_accuracy:.1%})"
        for score in scores
        if score.blank_accuracy is not None and score.interval_low <= score.blank_accuracy
    ]
    ceiling = [score.name for score in scores if score.accuracy >= CEILING]
    easy = [name for name, accuracies in kinds if min(accuracies) >= CEILING]
    warnings = []
    if floor:
        warnings.append(
            "At the floor, their interval reaching down to the accuracy with a blank image: "
            f"{', '.join(floor)}. Longer training or other rates may change everything about them."
        )
    if ceiling:
        warnings.append(
            f"At the ceiling, {CEILING:.0%} right or more: {', '.join(ceiling)}. Differences above "
            "it hardly show; harder questions would tell more."
        )
    elif easy and len(scores) > 1:
        warnings.append(
            f"Kinds of questions that all rows answer at the ceiling, {CEILING:.0%} right or more, "
            f"and that tell nothing apart: {', '.join(easy)}."
        )
    return warnings
