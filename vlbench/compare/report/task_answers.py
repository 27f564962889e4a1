"""What a run answered to the questions of a task, whoever asked them: scores, kinds, pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vlbench.compare.report.finished_runs import conversation_of
from vlbench.evaluate.tasks.score_report import number_equal_ids

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
    contents: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Question id -> true answer, and checksum of text and pictures, "" where not known: what tells
    whether an id stands for the same question. Left out where `settings` tell it of all."""
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
        contents={
            name: (str(line["truth"]), str(line.get("checksum", "")))
            for name, line in named.items()
            if "truth" in line  # of answers.jsonl
        },
    )


def number_repeats(lines: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the lines by the names of their questions.

    A line without a name is of an earlier version, or of a task whose ids are unique: it gets its
    id; of several with one id, the later ones get a number.
    """
    kept = list(lines)
    numbered = number_equal_ids(line["id"] for line in kept)
    return {str(line.get("name") or name): line for line, name in zip(kept, numbered, strict=True)}
