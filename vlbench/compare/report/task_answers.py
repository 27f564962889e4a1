"""What a run answered to the questions of a task, whoever asked them: scores, kinds, pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vlbench.compare.report.finished_runs import conversation_of

EVAL_FOLDER = "eval"  # of a run
LAST_CHECKPOINT = "last"
EXACT_MATCH, VQA_ACCURACY = "exact match", "VQA accuracy"


@dataclass(frozen=True)
class TaskAnswers:
    """What one run answered to the questions of one task."""

    task: str
    """Its name, under which the answers of other runs are looked for."""
    settings: Mapping[str, str]
    """How it was asked and scored: answers are paired if all of this is the same."""
    scores: Mapping[str, float]
    """Question id -> from 0, wrong, to 1, right."""
    kinds: Mapping[str, Mapping[str, str]]
    """Question id -> what kind of question it is, by `question_kinds.KINDS`."""
    clusters: Mapping[str, str]
    """Question id -> its picture, or else its conversation."""
    caution: str = ""
    """A sentence on what is not known of these answers."""


def conversation_answers(
    title: str, settings: Mapping[str, str], lines: Iterable[Mapping[str, Any]]
) -> TaskAnswers:
    """Return scored answers in conversations as those of a task, by the score in `settings`."""
    named = number_repeats(lines)
    score_key = "vqa" if settings["score"] == VQA_ACCURACY else "correct"
    return TaskAnswers(
        task=title,
        settings=settings,
        scores={name: float(line[score_key]) for name, line in named.items()},
        kinds={
            name: {"type": str(line["type"]), "language": str(line["language"])}
            for name, line in named.items()
        },
        clusters={
            name: str(line.get("picture") or conversation_of(str(line["id"])))
            for name, line in named.items()
        },
    )


def number_repeats(lines: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the lines by id; of several with one id, the later ones get a number."""
    named: dict[str, Mapping[str, Any]] = {}
    counts: dict[str, int] = {}
    for line in lines:
        name = str(line["id"])
        counts[name] = counts.get(name, 0) + 1
        named[name if counts[name] == 1 else f"{name}#{counts[name]}"] = line
    return named
