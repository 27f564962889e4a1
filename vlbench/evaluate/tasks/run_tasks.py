"""The tasks of `python -m vlbench eval`, run one after another."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from vlbench.command_line.arguments import EvalArguments
from vlbench.errors import UserError, suggest_name
from vlbench.evaluate.tasks.benchmark_tasks import RECORD_READERS, BenchmarkTask
from vlbench.evaluate.tasks.benchmark_types import GenerationLimits
from vlbench.evaluate.tasks.conversation_tasks import FILE_TASK, OWN_TASK, ConversationTask
from vlbench.evaluate.tasks.task_session import (
    ANSWERS_FILE,
    BLANK_FILE,
    SKIPPED_FILE,
    answer_remaining,
    open_task_folder,
)
from vlbench.load_model import find_model_folder, load_model
from vlbench.model.vlm import VLM
from vlbench.text_files import format_json_lines, write_atomically
from vlbench.train import checkpoint_files

BENCHMARK_KEYS = ("split", "protocol", "subjects", "seed")
TASK_NAMES = (*RECORD_READERS, OWN_TASK, FILE_TASK)
AnswerLines = list[dict[str, Any]]


class EvalTask(Protocol):
    """What a model can be asked, and what its answers are worth."""

    folder_name: str
    """Name of its folder among the answers of a model."""
    task_settings: dict[str, Any]
    """What is asked, and how: answers to something else are never mixed with these."""

    def select_questions(self, vlm: VLM) -> tuple[list[Any], list[dict[str, str]]]:
        """Return what is asked, and what cannot be, with the reason."""
        ...

    def generation_limits(self, vlm: VLM, questions: list[Any]) -> GenerationLimits:
        """Return how a model may answer."""
        ...

    def count_correct(self, answer_lines: AnswerLines) -> int | None:
        """Count right answers; None where the true ones are withheld."""
        ...

    def write_scores(
        self, folder: Path, answer_lines: AnswerLines, blank_lines: AnswerLines, skipped_count: int
    ) -> list[str]:
        """Write the scores into the folder, and return the lines of the report.

        `blind` are the answers to blank pictures, empty if they were not asked for.
        """
        ...


def run_tasks(task_names: list[str], arguments: EvalArguments) -> int:
    """Run every task and print its report; return the exit code."""
    _check_tasks(task_names, arguments)
    tasks: list[EvalTask] = [
        BenchmarkTask(name, arguments)
        if name in RECORD_READERS
        else ConversationTask(name, arguments)
        for name in task_names
    ]
    model_folder = find_model_folder(arguments.model, "model")
    vlm = load_model(arguments.model, arguments.dtype, arguments.device, arguments.template)
    for task in tasks:
        settings = {
            **task.task_settings,
            "model": str(model_folder),
            "batch": arguments.batch,
            **_own_settings(arguments),
        }
        folder = _answers_folder(task.folder_name, model_folder, arguments)
        _run_task(vlm, task, folder, settings, arguments)
    return 0


def _own_settings(arguments: EvalArguments) -> dict[str, str]:
    """Return the settings that differ from the model's own, which change its answers."""
    own = {"template": arguments.template, "dtype": arguments.dtype}
    return {key: value for key, value in own.items() if value}


def _check_tasks(task_names: list[str], arguments: EvalArguments) -> None:
    """Refuse tasks that do not exist, and keys that the tasks do not have."""
    for name in task_names or [""]:
        if name not in TASK_NAMES:
            known = ", ".join(TASK_NAMES)
            raise UserError(f"task is '{name}'; known are {known}.{suggest_name(name, TASK_NAMES)}")
    if len(task_names) > 1 and (arguments.data or arguments.out):
        raise UserError("data= and out= belong to one task; give one task=, or leave them out")
    if FILE_TASK in task_names and not arguments.data:
        raise UserError(f"task={FILE_TASK} needs data=FILE.json")
    tasks_of_key = {
        **dict.fromkeys(BENCHMARK_KEYS, tuple(RECORD_READERS)),
        "images": (FILE_TASK,),
        "data": (*RECORD_READERS, FILE_TASK),
    }
    for key, owners in tasks_of_key.items():
        if getattr(arguments, key) is not None and not set(task_names) & set(owners):
            raise UserError(
                f"{key}= is for task={' and '.join(owners)}, not for {', '.join(task_names)}"
            )


def _answers_folder(folder_name: str, model_folder: Path, arguments: EvalArguments) -> Path:
    """Return the folder of the answers: `out=`, or one in the run, by checkpoint and task."""
    if arguments.out:
        return Path(arguments.out)
    run = Path(arguments.model)
    is_run = (
        checkpoint_files.is_run_or_checkpoint(run)
        and (run / "recipe.yaml").is_file()
        and run != model_folder
    )
    name = "-".join([folder_name, *_own_settings(arguments).values()])
    return (run / "eval" if is_run else Path("evals")) / model_folder.name / name


def _run_task(
    vlm: VLM,
    task: EvalTask,
    folder: Path,
    task_settings: dict[str, Any],
    arguments: EvalArguments,
) -> None:
    """Run one task, write its scores, and print them.

    Args:
        vlm: The model.
        task: What it is asked.
        folder: Folder of the answers and scores.
        task_settings: What the folder holds answers to; answers to anything else are refused.
        arguments: Batch size, blank images and compiled generation.
    """
    open_task_folder(folder, task_settings)
    asked, skipped = task.select_questions(vlm)
    if not asked:
        raise UserError(f"{task.folder_name}: no question can be asked; the first: {skipped[0]}")
    write_atomically(folder / SKIPPED_FILE, format_json_lines(skipped))
    limits = task.generation_limits(vlm, asked)

    def answer_into(file_name: str, use_blank_images: bool) -> AnswerLines:
        return answer_remaining(
            vlm,
            asked,
            limits,
            task.count_correct,
            arguments.batch,
            folder / file_name,
            use_blank_images,
            arguments.compiled,
        )

    lines = answer_into(ANSWERS_FILE, False)
    blind = answer_into(BLANK_FILE, True) if arguments.blank else []
    report = "\n".join(task.write_scores(folder, lines, blind, len(skipped)))
    write_atomically(folder / "report.txt", f"{report}\n")
    print(f"{report}\n\nwrote {folder}")
