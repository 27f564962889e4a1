"""`compare tasks=mmmu,vqa.json`: what every run is asked when all have ended, by `eval`.

The answers lie in the run (RUN/eval/CHECKPOINT/TASK/), where `report` finds them. What was asked is
not asked again, and what was interrupted goes on. `own` are the questions that `fit` asks anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlbench.command_line.arguments import EvalArguments
from vlbench.command_line.task_words import OWN_TASK, build_tasks
from vlbench.compare.experiment.grid import ComparisonGrid
from vlbench.compare.experiment.run_jobs import TrainingJob, count_slots, train_jobs
from vlbench.compare.report.task_answers import EVAL_FOLDER
from vlbench.evaluate.batch_inference import (
    ANSWERS_FILE,
    BLANK_FILE,
    REPORT_FILE,
    SCORES_FILE,
    SETTINGS_FILE,
)
from vlbench.evaluate.eval_command import open_task
from vlbench.text_files import read_json, read_json_lines
from vlbench.train.run_folder import RunFolder
from vlbench.train.run_report import format_duration, print_status


@dataclass(frozen=True)
class PlannedTask:
    """A task that every run is asked: the folder of its answers, what is asked, and how much."""

    folder_name: str
    settings: dict[str, Any]
    question_count: int
    blank: bool = False
    """Whether the questions are asked with blank images as well."""
    seed: int | None = None
    """Of the draws for answers that cannot be parsed; None: the benchmark's own."""

    def is_asked(self, run_folder: Path) -> bool:
        """Return whether a run's last checkpoint, the one that `eval` asks, has answered all of it.

        An earlier one may have been asked while the run trained; rows are compared by their last.
        """
        position = RunFolder(run_folder).latest_position
        if position is None:
            return False
        folder = run_folder / EVAL_FOLDER / position.folder_name / self.folder_name
        return (folder / REPORT_FILE).is_file() and self._is_same(folder)

    def _is_same(self, folder: Path) -> bool:
        stored = read_json(folder / SETTINGS_FILE)
        is_asked = all(stored.get(key) == value for key, value in self.settings.items())
        return is_asked and self._is_scored(folder) and (not self.blank or _has_all_blank(folder))

    def _is_scored(self, folder: Path) -> bool:
        """Tell whether the scores are those asked for; where answers are withheld there are none.

        Draws were made with the seed, and questions with blank images are scored. The report does
        not tell: it may be older than answers to blank images that were asked for later.
        """
        file = folder / SCORES_FILE
        scores = read_json(file) if file.is_file() else None
        if scores is None:
            return True
        is_drawn = self.seed is None or scores.get("seed", self.seed) == self.seed
        return is_drawn and (not self.blank or "blank" in scores)


def _has_all_blank(folder: Path) -> bool:
    """Tell whether every question that was asked was asked with blank images as well."""
    asked, blank = (read_json_lines(folder / name) for name in (ANSWERS_FILE, BLANK_FILE))
    return len(blank) == len(asked)


def plan_tasks(grid: ComparisonGrid) -> list[PlannedTask]:
    """Return the tasks of `tasks=` without `own`; their data are read, and mistakes are told."""
    if grid.tasks is None:
        return []
    asked = build_tasks("tasks", grid.tasks, EvalArguments(model="RUN"), grid.task_words)
    return [
        PlannedTask(
            task.folder_name,
            task.task_settings,
            task.question_count,
            arguments.blank,
            arguments.seed,
        )
        for arguments in asked
        if arguments.task != OWN_TASK
        for task in [open_task(arguments)]
    ]


def make_eval_jobs(grid: ComparisonGrid, tasks: Sequence[PlannedTask]) -> list[TrainingJob]:
    """Return the jobs that ask finished runs what they have not answered, one for each run."""
    items = [item.strip() for item in (grid.tasks or "").split(",")]
    asked = ",".join(item for item in items if item and item != OWN_TASK)
    own_words = [word.replace("tasks.", "task.", 1) for word in grid.task_words]
    return [
        TrainingJob(
            f"{row.name}, seed {seed}, tasks",
            (f"model={folder}", f"task={asked}", *own_words),
            folder / EVAL_FOLDER,
            verb="eval",
        )
        for seed in grid.seeds
        for row in grid.rows
        for folder in [grid.run_folder(row, seed)]
        if RunFolder(folder).is_finished and not all(task.is_asked(folder) for task in tasks)
    ]


def ask_runs(grid: ComparisonGrid, tasks: Sequence[PlannedTask]) -> list[str]:
    """Ask every finished run the tasks that it has not answered; return what failed, in sentences.

    Raises `ComparisonStopped` as `train_jobs` does; answers are kept, batch by batch.
    """
    failures = []

    def start_job(job: TrainingJob) -> None:
        print(f"{job.title}: asks, log in {job.log_file}", flush=True)

    def finish_job(job: TrainingJob, exit_code: int) -> None:
        if exit_code:
            failures.append(f"{job.title}: not asked ({job.last_log_line}).")
            print_status(failures[-1])
        else:
            print(f"{job.title}: asked", flush=True)

    jobs = make_eval_jobs(grid, tasks)
    train_jobs(jobs, count_slots(grid.jobs), lambda _: True, start_job, finish_job)
    return failures


def describe_tasks(
    tasks: Sequence[PlannedTask], run_folders: Sequence[Path], question_seconds: float | None
) -> list[str]:
    """Return a line on what the tasks will cost, [] without tasks.

    `question_seconds` is what one of the runs' own questions takes, None where that is not known.
    """
    if not tasks:
        return []
    named = ", ".join(f"{task.folder_name} ({task.question_count:,})" for task in tasks)
    left = sum(
        task.question_count for folder in run_folders for task in tasks if not task.is_asked(folder)
    )
    cost = ""
    if question_seconds is not None and left:
        cost = f", about {format_duration(question_seconds * left)} in all if their answers are "
        cost += "as short as those of the runs' own questions"
    return [f"  every run is then asked {named}: {left:,} questions to go{cost}"]
