"""All that a run was asked beside its own questions: its other sets, and what came later.

    RUN/answers.jsonl                     the set `unseen`, and any other one that is no control
    RUN/eval/CHECKPOINT/TASK/             what `eval` asked (`eval_answers`)
    RUN/eval/**/*_samples_TASK.jsonl      what lmms-eval logged (`lmms_samples`)

What cannot be compared is a sentence, never left out silently.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlbench.compare.report.finished_runs import COMPARED_SET, AnswerLine
from vlbench.compare.report.task_answers import (
    EVAL_FOLDER,
    EXACT_MATCH,
    TaskAnswers,
    conversation_answers,
)
from vlbench.errors import UserError
from vlbench.regular_files import MAX_RECORDS_BYTES
from vlbench.strict_values import check_record
from vlbench.text_files import parse_json, read_text, split_lines

CONTROL_SETS = ("blank", "shuffled")  # of answers.jsonl: the same questions with other images
SET_TITLES = {"unseen": "unseen pairs"}
"""Sets of answers.jsonl -> their titles in a report."""


def read_task_answers(folder: Path) -> tuple[list[TaskAnswers], list[str]]:
    """Return what the run in `folder` answered beside its own questions, and sentences.

    The sentences say what is there and cannot be compared.
    """
    answers = _read_own_sets(folder / "answers.jsonl")
    if not (folder / EVAL_FOLDER).is_dir():
        return answers, []
    from vlbench.compare.report.eval_answers import read_eval_answers  # imports torch
    from vlbench.compare.report.lmms_samples import read_lmms_samples

    asked, remarks = read_eval_answers(folder)
    logged, log_remarks = read_lmms_samples(folder)
    return [*answers, *asked, *logged], [*remarks, *log_remarks]


def _read_own_sets(file: Path) -> list[TaskAnswers]:
    """Return the sets of answers.jsonl other than the compared one and the controls."""
    sets: dict[str, list[dict[str, Any]]] = {}
    try:
        for line in map(parse_json, split_lines(read_text(file, MAX_RECORDS_BYTES))):
            if line["set"] not in (COMPARED_SET, *CONTROL_SETS):
                check_record(line, AnswerLine, file)
                sets.setdefault(str(line["set"]), []).append(line)
        return [
            conversation_answers(SET_TITLES.get(name, name), {"score": EXACT_MATCH}, lines)
            for name, lines in sets.items()
        ]
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: holds a line that is no answer") from error
