"""`python -m vlbench eval run=... [task=mmmu,cmmmu data=DIR]`: a model takes tasks, one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from vlbench.data.template import template_named
from vlbench.evaluate.tasks.benchmark import READ, Benchmark
from vlbench.evaluate.tasks.conversations import FILE, OWN, Conversations
from vlbench.evaluate.tasks.exam import ANSWERS, BLANK, SKIPPED, open_folder, take
from vlbench.evaluate.tasks.record import Generation
from vlbench.files import json_lines, write_whole
from vlbench.mistakes import Mistake, nearest
from vlbench.model.vlm import VLM
from vlbench.serve.load import find as find_model
from vlbench.serve.load import load
from vlbench.train import checkpoint
from vlbench.words import truth, whole

BENCHMARKS = ("split", "protocol", "subjects", "seed")
KEYS = ("task", "data", "images", "limit", "out", "batch", "blank", "template", *BENCHMARKS)
TASKS = (*READ, OWN, FILE)
Lines = list[dict[str, Any]]


class Task(Protocol):
    """What a model can be asked, and what its answers are worth."""

    label: str
    """Name of its folder among the answers of a model."""
    about: dict[str, Any]
    """What is asked, and how: answers to something else are never mixed with these."""

    def questions(self, vlm: VLM) -> tuple[list[Any], list[dict[str, str]]]:
        """Return what is asked, and what cannot be, with the reason."""
        ...

    def limits(self, vlm: VLM, asked: list[Any]) -> Generation:
        """Return how a model may answer."""
        ...

    def right(self, lines: Lines) -> int | None:
        """Count right answers; None where the true ones are withheld."""
        ...

    def finish(self, folder: Path, lines: Lines, blind: Lines, skipped: int) -> list[str]:
        """Write the scores into the folder, and return the lines of the report.

        `blind` are the answers to blank pictures, empty if they were not asked for.
        """
        ...


def main(given: dict[str, str]) -> int:
    """Take every task of `task=`, and report; `given` are the keys of `eval`."""
    names = list(dict.fromkeys(one for one in given["task"].split(",") if one))
    _check(names, given)
    batch, blank = whole(given, "batch", 16, 1, 4096), truth(given, "blank")
    template = template_named(given.get("template"))
    tasks: list[Task] = [
        Benchmark(name, given) if name in READ else Conversations(name, given) for name in names
    ]
    model = find_model(given["run"], "run")
    vlm = load(given["run"], template=template)
    for task in tasks:
        about = {**task.about, "model": str(model), "batch": batch}
        if template:  # else it is the model's own
            about["template"] = template
        _take(vlm, task, _folder(task.label, model, given), about, batch, blank)
    return 0


def _check(names: list[str], given: dict[str, str]) -> None:
    """Refuse tasks that do not exist, and keys that the tasks do not have."""
    for name in names or [""]:
        if name not in TASKS:
            known = ", ".join(TASKS)
            raise Mistake(f"task is '{name}'; known are {known}.{nearest(name, TASKS)}")
    if len(names) > 1 and ("data" in given or "out" in given):
        raise Mistake("data= and out= belong to one task; give one task=, or leave them out")
    if FILE in names and "data" not in given:
        raise Mistake(f"task={FILE} needs data=FILE.json")
    allowed = {**dict.fromkeys(BENCHMARKS, READ), "images": (FILE,), "data": (*READ, FILE)}
    for key, owners in allowed.items():
        if key in given and not set(names) & set(owners):
            raise Mistake(f"{key}= is for task={' and '.join(owners)}, not for {', '.join(names)}")


def _folder(label: str, model: Path, given: dict[str, str]) -> Path:
    """Return the folder of the answers: `out=`, or a run's own, by checkpoint and task."""
    if "out" in given:
        return Path(given["out"]).expanduser()
    run = Path(given["run"]).expanduser()
    own = checkpoint.holds(run) and (run / "recipe.yaml").is_file() and run != model
    if "template" in given:
        label = f"{label}-{given['template']}"
    return (run / "eval" if own else Path("evals")) / model.name / label


def _take(
    vlm: VLM, task: Task, folder: Path, about: dict[str, Any], batch: int, blank: bool
) -> None:
    """Take one task, write its scores, and print them; `about` says what the folder holds."""
    open_folder(folder, about)
    asked, skipped = task.questions(vlm)
    if not asked:
        raise Mistake(f"{task.label}: no question can be asked; the first: {skipped[0]}")
    write_whole(folder / SKIPPED, json_lines(skipped))
    limits = task.limits(vlm, asked)

    def answered(file: str, blind: bool) -> Lines:
        return take(vlm, asked, limits, task.right, batch, folder / file, blind)

    lines = answered(ANSWERS, False)
    blind = answered(BLANK, True) if blank else []
    report = "\n".join(task.finish(folder, lines, blind, len(skipped)))
    write_whole(folder / "report.txt", f"{report}\n")
    print(f"{report}\n\nwrote {folder}")
