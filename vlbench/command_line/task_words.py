"""The tasks that `eval` and `compare` ask: `task=mmmu,vqa.json task.mmmu.data=DIR`.

A task is a name of `TASK_NAMES`, or a file in LLaVA's layout, which is then called by its stem. A
key may be given to one of several: `task.NAME.KEY=VALUE`, in `compare` `tasks.NAME.KEY=VALUE`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import get_args

from vlbench.command_line.arguments import BenchmarkName, EvalArguments
from vlbench.command_line.parser import parse_arguments
from vlbench.errors import UserError, suggest_name

BENCHMARKS: tuple[str, ...] = get_args(BenchmarkName)
OWN_TASK, FILE_TASK = "own", "llava_json"
TASK_NAMES = (*BENCHMARKS, OWN_TASK, FILE_TASK)
FILE_SUFFIXES = (".json", ".jsonl")
TASKS_OF_KEY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("split", "protocol", "subjects", "seed"), BENCHMARKS),
    "images": (FILE_TASK,),
    "allow_outside": (FILE_TASK,),
    "data": (*BENCHMARKS, FILE_TASK),
    "limit": TASK_NAMES,
    "blank": TASK_NAMES,
    "batch": TASK_NAMES,
}
"""Keys that a task of its own may have -> the tasks that have them."""


def parse_eval_words(words: Sequence[str]) -> list[EvalArguments]:
    """Return the arguments of `eval`, once for each task that is to be asked."""
    task_words, others = split_task_words("task", words)
    arguments = parse_arguments(EvalArguments, others)
    text = arguments.task or (FILE_TASK if arguments.data else OWN_TASK)
    return build_tasks("task", text, arguments, task_words)


def split_task_words(key: str, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words for single tasks, which begin with `key` and a dot, and all others."""
    task_words = [word for word in words if word.partition("=")[0].startswith(f"{key}.")]
    return task_words, [word for word in words if word not in task_words]


def build_tasks(
    key: str, text: str, shared: EvalArguments, task_words: Sequence[str]
) -> list[EvalArguments]:
    """Return the arguments of every task; a UserError has all mistakes.

    Args:
        key: What the tasks were given with, `task` or `tasks`.
        text: The tasks, with commas between them.
        shared: What all tasks are asked with.
        task_words: `KEY.NAME.KEY=VALUE`, what one of them is asked with.
    """
    items = dict.fromkeys(item.strip() for item in text.split(",") if item.strip())
    kinds = {item: _kind_of(key, item) for item in items or [""]}
    names = [_name_of(item) for item in kinds]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise UserError(f"{key}={text}: two tasks are called {repeated[0]}")
    own_words = _words_by_task(key, names, task_words)
    _check_shared(key, list(kinds.values()), shared)
    tasks, mistakes = [], []
    for (item, kind), name in zip(kinds.items(), names, strict=True):
        words = [*([f"data={item}"] if item not in TASK_NAMES else []), *own_words[name]]
        try:
            tasks.append(_with_own_words(kind, words, shared))
        except UserError as error:
            mistakes += [f"{key}.{name}.{line}" for line in error.lines]
    if mistakes:
        raise UserError(*mistakes)
    for task, name in zip(tasks, names, strict=True):
        if task.task == FILE_TASK and not task.data:
            way = "data=FILE.json" if key == "task" else f"{key}.{name}.data=FILE.json"
            raise UserError(f"{key}={FILE_TASK} needs {way}")
    return tasks


def _kind_of(key: str, item: str) -> str:
    """Return which of `TASK_NAMES` a task is."""
    if item in TASK_NAMES:
        return item
    if PurePath(item).suffix in FILE_SUFFIXES:
        return FILE_TASK
    known = ", ".join(TASK_NAMES)
    raise UserError(f"{key} is '{item}'; known are {known}.{suggest_name(item, TASK_NAMES)}")


def _name_of(item: str) -> str:
    return item if item in TASK_NAMES else PurePath(item).stem


def _words_by_task(
    key: str, names: Sequence[str], task_words: Sequence[str]
) -> dict[str, list[str]]:
    """Return the words `KEY=VALUE` of every task."""
    found: dict[str, list[str]] = {name: [] for name in names}
    for word in task_words:
        given, _, value = word.partition("=")
        name, dot, own_key = given.removeprefix(f"{key}.").rpartition(".")
        if not dot or own_key not in TASKS_OF_KEY:
            known = ", ".join(TASKS_OF_KEY)
            near = suggest_name(own_key, TASKS_OF_KEY)
            raise UserError(f"'{word}' is no {key}.NAME.KEY=VALUE; the keys are {known}.{near}")
        if name not in found:
            known = ", ".join(names)
            near = suggest_name(name, names)
            raise UserError(f"'{word}': the tasks that are asked are {known}.{near}")
        found[name].append(f"{own_key}={value}")
    return found


def _check_shared(key: str, kinds: Sequence[str], shared: EvalArguments) -> None:
    """Raise a UserError for what all tasks were given and only one, or none, can have."""
    if len(kinds) > 1 and (shared.data or shared.out):
        raise UserError(
            f"data= and out= belong to one task; give one {key}=, or {key}.NAME.data=PATH for "
            "each of several"
        )
    _check_keys(vars(shared), kinds)


def _check_keys(values: Mapping[str, object], kinds: Sequence[str]) -> None:
    """Raise a UserError for a key that is given and that none of the tasks has."""
    for own_key, owners in TASKS_OF_KEY.items():
        if values.get(own_key) not in (None, False) and not set(kinds) & set(owners):
            raise UserError(
                f"{own_key}= is for task={' and '.join(owners)}, not for {', '.join(kinds)}"
            )


def _with_own_words(kind: str, words: Sequence[str], shared: EvalArguments) -> EvalArguments:
    """Return the shared arguments with those of one task."""
    parsed = parse_arguments(EvalArguments, ["model=RUN", *words])
    own = {word.partition("=")[0]: None for word in words}
    values = {name: getattr(parsed, name) for name in own}
    _check_keys(values, [kind])
    return dataclasses.replace(shared, task=kind, **values)
