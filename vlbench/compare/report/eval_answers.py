"""Answers that `eval` wrote into a run: RUN/eval/CHECKPOINT/TASK/, settings and scored answers."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlbench.command_line.task_words import OWN_TASK
from vlbench.compare.report.task_answers import (
    EVAL_FOLDER,
    EXACT_MATCH,
    LAST_CHECKPOINT,
    VQA_ACCURACY,
    TaskAnswers,
    conversation_answers,
    number_repeats,
)
from vlbench.errors import UserError
from vlbench.evaluate.batch_inference import SETTINGS_FILE
from vlbench.evaluate.tasks.benchmark_types import SUBJECT_DOMAINS
from vlbench.text_files import read_json, read_json_lines
from vlbench.train.checkpoint_files import CHECKPOINT_NAME
from vlbench.train.run_folder import RunFolder

BENCHMARK_SCORE = "accuracy"
PAIRED_SETTINGS = ("protocol", "revision", "pictures", "template", "dtype")
"""Of settings.json: what has to be the same for answers to be paired, beside the checkpoint."""


def read_eval_answers(run_folder: Path) -> tuple[list[TaskAnswers], list[str]]:
    """Return what `eval` asked of a run, and sentences on what cannot be compared.

    Of several answers to a task under the same settings, as with another `out=` and `limit=`, those
    to the most questions count.
    """
    answers: dict[str, TaskAnswers] = {}
    remarks = []
    for file in sorted((run_folder / EVAL_FOLDER).rglob(SETTINGS_FILE)):
        try:
            asked, remark = _read_folder(run_folder, file.parent)
        except UserError as error:
            asked, remark = [], f"{error}; it is left out."
        remarks += [remark] if remark else []
        for one in asked:
            key = json.dumps([one.task, *sorted(one.settings.items())])
            if key in answers:
                remarks.append(f"{file.parent}: {one.task} is there twice; the most answers count.")
            answers[key] = max(one, answers.get(key, one), key=lambda some: len(some.scores))
    return list(answers.values()), remarks


def _read_folder(run_folder: Path, folder: Path) -> tuple[list[TaskAnswers], str]:
    """Return the answers in a folder of `eval`, and a sentence if they cannot be compared."""
    settings = read_json(folder / SETTINGS_FILE)
    if not (folder / "scored.jsonl").is_file():
        if any(folder.glob("submission.*")):
            return [], f"{folder}: the true answers are withheld, so nothing can be compared."
        return [], f"{folder}: not all questions are answered; the same eval goes on."
    paired = {key: str(settings[key]) for key in PAIRED_SETTINGS if settings.get(key)}
    models = [str(settings[key]) for key in ("model",) if settings.get(key)]
    paired["checkpoint"] = asked_checkpoint(run_folder, folder, models, "eval")
    lines = read_json_lines(folder / "scored.jsonl")
    task = str(settings.get("task"))
    try:
        if task in SUBJECT_DOMAINS:
            return [_benchmark_answers(folder, settings, paired, lines)], ""
        is_own_exam = task == OWN_TASK and not {"template", "dtype"} & {*paired}
        if is_own_exam and paired["checkpoint"] == LAST_CHECKPOINT:
            return [], "What eval asked again of the runs' own questions is not compared again."
        return _conversation_sets(task, paired, lines), ""
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'scored.jsonl'}: holds no scored answers") from error


def asked_checkpoint(
    run_folder: Path, answers: Path, model_paths: Sequence[str], asker: str
) -> str:
    """Return the checkpoint of a run that gave answers: "last", or the name of an earlier one.

    It is that of the `model_paths` that were asked, else that of the folder in which `answers` lie
    below the run's `eval`. Raises a UserError where the answers are those of another model. A path
    that is not there any more is that of a run that has moved, and one to a run of the same recipe,
    seed and folder that of a run that was copied.
    """
    own = run_folder.resolve()
    for path in map(Path, model_paths):
        is_own = path.resolve().is_relative_to(own) or _is_copied(run_folder, path)
        if path.exists() and not is_own:
            raise UserError(f"{answers}: {asker} asked another model, {path}")
        if CHECKPOINT_NAME.fullmatch(path.name):
            return _checkpoint_role(run_folder, path.name)
    for name in answers.relative_to(run_folder / EVAL_FOLDER).parts:
        if CHECKPOINT_NAME.fullmatch(name):
            return _checkpoint_role(run_folder, name)
    return LAST_CHECKPOINT  # `model=RUN` is its last one


def _is_copied(run_folder: Path, model_path: Path) -> bool:
    """Tell whether a run or checkpoint is of a run with the same recipe file, to the last byte."""
    folder = model_path.parent.parent if CHECKPOINT_NAME.fullmatch(model_path.name) else model_path
    theirs, own = folder / "recipe.yaml", run_folder / "recipe.yaml"
    return theirs.is_file() and own.is_file() and filecmp.cmp(theirs, own, shallow=False)


def _checkpoint_role(run_folder: Path, name: str) -> str:
    """Return "last" for the name of a run's last checkpoint, any other name as it is."""
    position = RunFolder(run_folder).latest_position
    return LAST_CHECKPOINT if position and position.folder_name == name else name


def _benchmark_answers(
    folder: Path,
    settings: Mapping[str, Any],
    paired: dict[str, str],
    lines: Iterable[Mapping[str, Any]],
) -> TaskAnswers:
    """Return the scored answers to MMMU or CMMMU."""
    task, seed = settings["task"], read_json(folder / "scores.json").get("seed")
    named = number_repeats(lines)
    domain_of = SUBJECT_DOMAINS[task].domain_of
    return TaskAnswers(
        task=f"{task} {settings['split']}",
        settings=paired | {"score": BENCHMARK_SCORE, "seed of draws": str(seed)},
        scores={name: float(line["correct"]) for name, line in named.items()},
        kinds={
            name: {"type": str(line["type"]), "domain": domain_of(line["subject"])}
            for name, line in named.items()
        },
        clusters={name: str(line.get("picture") or name) for name, line in named.items()},
    )


def _conversation_sets(
    task: str, paired: Mapping[str, str], lines: Iterable[Mapping[str, Any]]
) -> list[TaskAnswers]:
    """Return the scored answers to a file, or to a run's own questions, set by set.

    Where several people answered a question, the score is that of the VQA challenge.
    """
    sets: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        sets.setdefault(line["set"], []).append(line)
    found = []
    for name, asked in sets.items():
        has_several = any(len(line["answer"]) > 1 for line in asked)
        title = f"own questions, {name}" if task == OWN_TASK else Path(name).name
        score = VQA_ACCURACY if has_several else EXACT_MATCH
        found.append(conversation_answers(title, {**paired, "score": score}, asked))
    return found
