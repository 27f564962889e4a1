"""`python -m vlbench eval model=... [task=mmmu,cmmmu]`: a model answers questions of tasks.

The model is a run, a checkpoint or a release; the tasks are evaluated one after the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from vlbench.command_line.arguments import EvalArguments
from vlbench.command_line.task_words import OWN_TASK
from vlbench.errors import UserError
from vlbench.evaluate.batch_inference import (
    ANSWERS_FILE,
    BLANK_FILE,
    REPORT_FILE,
    SKIPPED_FILE,
    answer_remaining,
    open_answers_folder,
)
from vlbench.evaluate.tasks.benchmark_records import RECORD_READERS
from vlbench.evaluate.tasks.benchmark_tasks import BenchmarkTask
from vlbench.evaluate.tasks.benchmark_types import GenerationLimits
from vlbench.evaluate.tasks.conversation_tasks import ConversationTask
from vlbench.load_model import find_model_folder, load_chosen_model
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.weights.weight_origin import sample_weights
from vlbench.text_files import format_json_lines, write_atomically, write_for_people
from vlbench.train import checkpoint_files

AnswerLines = list[dict[str, Any]]


class EvalTask(Protocol):
    """A set of questions for a model, and how its answers are scored."""

    folder_name: str
    """Name of the folder with a model's answers."""
    task_settings: dict[str, Any]
    """What is asked, and how: a folder never mixes answers under different settings."""
    question_count: int
    """Those that cannot be asked included."""

    def select_questions(self, vlm: LoadedVLM) -> tuple[list[Any], list[dict[str, str]]]:
        """Return the questions that can be asked, and those that cannot, with the reason."""
        ...

    def generation_limits(self, vlm: LoadedVLM, questions: list[Any]) -> GenerationLimits:
        """Return how a model may answer."""
        ...

    def count_correct(self, answer_lines: AnswerLines) -> int | None:
        """Count right answers; None where the true ones are withheld."""
        ...

    def write_scores(
        self, folder: Path, answer_lines: AnswerLines, blank_lines: AnswerLines, skipped_count: int
    ) -> list[str]:
        """Write the scores into the folder, and return the lines of the report.

        `blank_lines` are the answers to blank images, empty if they were not asked for.
        """
        ...


def run_eval(asked: Sequence[EvalArguments]) -> int:
    """Evaluate a model on tasks, one after the other; `asked` are the arguments of each."""
    tasks = [open_task(arguments) for arguments in asked]
    model_folder = find_model_folder(asked[0].model, "model")
    vlm = load_chosen_model(asked[0])
    weights = f"sha256 {sample_weights(vlm.model)[:16]}"
    for arguments, task in zip(asked, tasks, strict=True):
        named_model = {"model": str(model_folder), "weights": weights}
        model_settings = {**named_model, **_chosen_settings(arguments)}
        folder = _answers_folder(task.folder_name, model_folder, arguments)
        settings = {**task.task_settings, "batch": arguments.batch, **model_settings}
        with contextlib.ExitStack() as held_locks:
            open_answers_folder(folder, settings, held_locks, is_named=bool(arguments.out))
            _run_task(vlm, task, folder, arguments)
    return 0


def open_task(arguments: EvalArguments) -> EvalTask:
    """Return the task that the arguments name, with its questions."""
    task = arguments.task or OWN_TASK
    is_benchmark = task in RECORD_READERS
    return BenchmarkTask(task, arguments) if is_benchmark else ConversationTask(task, arguments)


def _chosen_settings(arguments: EvalArguments) -> dict[str, str]:
    """Return the settings in place of the model's own, on which its answers depend."""
    chosen = {"template": arguments.template, "dtype": arguments.dtype}
    return {key: value for key, value in chosen.items() if value}


def _answers_folder(folder_name: str, model_folder: Path, arguments: EvalArguments) -> Path:
    """Return the folder of the answers: `out=`, or by checkpoint and task below a run's own."""
    if arguments.out:
        return Path(arguments.out)
    run = Path(arguments.model)
    is_run = (
        checkpoint_files.is_run_or_checkpoint(run)
        and (run / "recipe.yaml").is_file()
        and run != model_folder
    )
    name = "-".join([folder_name, *_chosen_settings(arguments).values()])
    return (run / "eval" if is_run else Path("evals")) / model_folder.name / name


def _run_task(vlm: LoadedVLM, task: EvalTask, folder: Path, arguments: EvalArguments) -> None:
    """Answer the questions of one task, write its scores into the folder, and print them."""
    questions, skipped = task.select_questions(vlm)
    if not questions:
        raise UserError(f"{task.folder_name}: no question can be asked; the first: {skipped[0]}")
    write_atomically(folder / SKIPPED_FILE, format_json_lines(skipped))
    limits = task.generation_limits(vlm, questions)

    def answer_into(file_name: str, use_blank_images: bool) -> AnswerLines:
        """Answer the questions that have no answer in a file yet; return all its lines."""
        return answer_remaining(
            vlm,
            questions,
            limits,
            task.count_correct,
            arguments.batch,
            folder / file_name,
            use_blank_images,
            arguments.compiled,
        )

    lines = answer_into(ANSWERS_FILE, False)
    blank_lines = answer_into(BLANK_FILE, True) if arguments.blank else []
    report = "\n".join(task.write_scores(folder, lines, blank_lines, len(skipped)))
    write_for_people(folder / REPORT_FILE, f"{report}\n")
    print(f"{report}\n\nwrote {folder}")
