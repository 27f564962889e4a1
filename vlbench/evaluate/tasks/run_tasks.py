"""`python -m vlbench eval run=... [task=mmmu,cmmmu data=DIR]`: a model takes tasks, one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from vlbench.config.overrides import read_boolean, read_integer
from vlbench.data.chat_template import check_template_name
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
from vlbench.load_model import find_model_folder as find_model
from vlbench.load_model import load_model
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.text_files import format_json_lines, write_atomically
from vlbench.train import checkpoint_files

BENCHMARK_OPTIONS = ("split", "protocol", "subjects", "seed")
EVAL_OPTIONS = (
    "task",
    "data",
    "images",
    "limit",
    "out",
    "batch",
    "blank",
    "template",
    *BENCHMARK_OPTIONS,
)
TASK_NAMES = (*RECORD_READERS, OWN_TASK, FILE_TASK)
AnswerLines = list[dict[str, Any]]


class EvalTask(Protocol):
    """What a model can be asked, and what its answers are worth."""

    folder_name: str
    """Name of its folder among the answers of a model."""
    task_settings: dict[str, Any]
    """What is asked, and how: answers to something else are never mixed with these."""

    def select_questions(self, vlm: LoadedVLM) -> tuple[list[Any], list[dict[str, str]]]:
        """Return what is asked, and what cannot be, with the reason."""
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

        `blind` are the answers to blank pictures, empty if they were not asked for.
        """
        ...


def run_tasks(options: dict[str, str]) -> int:
    """Take every task of `task=`, and report; `given` are the keys of `eval`."""
    names = list(dict.fromkeys(one for one in options["task"].split(",") if one))
    _check_tasks(names, options)
    batch, blank = read_integer(options, "batch", 16, 1, 4096), read_boolean(options, "blank")
    template = check_template_name(options.get("template"))
    tasks: list[EvalTask] = [
        BenchmarkTask(name, options) if name in RECORD_READERS else ConversationTask(name, options)
        for name in names
    ]
    model = find_model(options["run"], "run")
    vlm = load_model(options["run"], template=template)
    for task in tasks:
        about = {**task.task_settings, "model": str(model), "batch": batch}
        if template:  # else it is the model's own
            about["template"] = template
        _run_task(vlm, task, _answers_folder(task.folder_name, model, options), about, batch, blank)
    return 0


def _check_tasks(task_names: list[str], options: dict[str, str]) -> None:
    """Refuse tasks that do not exist, and keys that the tasks do not have."""
    for name in task_names or [""]:
        if name not in TASK_NAMES:
            known = ", ".join(TASK_NAMES)
            raise UserError(f"task is '{name}'; known are {known}.{suggest_name(name, TASK_NAMES)}")
    if len(task_names) > 1 and ("data" in options or "out" in options):
        raise UserError("data= and out= belong to one task; give one task=, or leave them out")
    if FILE_TASK in task_names and "data" not in options:
        raise UserError(f"task={FILE_TASK} needs data=FILE.json")
    allowed = {
        **dict.fromkeys(BENCHMARK_OPTIONS, RECORD_READERS),
        "images": (FILE_TASK,),
        "data": (*RECORD_READERS, FILE_TASK),
    }
    for key, owners in allowed.items():
        if key in options and not set(task_names) & set(owners):
            raise UserError(
                f"{key}= is for task={' and '.join(owners)}, not for {', '.join(task_names)}"
            )


def _answers_folder(folder_name: str, model_path: Path, options: dict[str, str]) -> Path:
    """Return the folder of the answers: `out=`, or a run's own, by checkpoint and task."""
    if "out" in options:
        return Path(options["out"]).expanduser()
    run = Path(options["run"]).expanduser()
    own = (
        checkpoint_files.is_run_or_checkpoint(run)
        and (run / "recipe.yaml").is_file()
        and run != model_path
    )
    if "template" in options:
        folder_name = f"{folder_name}-{options['template']}"
    return (run / "eval" if own else Path("evals")) / model_path.name / folder_name


def _run_task(
    vlm: LoadedVLM,
    task: EvalTask,
    folder: Path,
    task_settings: dict[str, Any],
    batch_size: int,
    with_blank_images: bool,
) -> None:
    """Take one task, write its scores, and print them; `about` says what the folder holds."""
    open_task_folder(folder, task_settings)
    asked, skipped = task.select_questions(vlm)
    if not asked:
        raise UserError(f"{task.folder_name}: no question can be asked; the first: {skipped[0]}")
    write_atomically(folder / SKIPPED_FILE, format_json_lines(skipped))
    limits = task.generation_limits(vlm, asked)

    def answer_into(file_name: str, use_blank_images: bool) -> AnswerLines:
        return answer_remaining(
            vlm, asked, limits, task.count_correct, batch_size, folder / file_name, use_blank_images
        )

    lines = answer_into(ANSWERS_FILE, False)
    blind = answer_into(BLANK_FILE, True) if with_blank_images else []
    report = "\n".join(task.write_scores(folder, lines, blind, len(skipped)))
    write_atomically(folder / "report.txt", f"{report}\n")
    print(f"{report}\n\nwrote {folder}")
