"""`vlbench.fit` from a program or a notebook: keys of a recipe in, a finished run out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlbench.command_line.overrides import format_override
from vlbench.config import recipe as recipes
from vlbench.distributed.launcher import is_launched
from vlbench.distributed.machine_limits import check_machine_limits
from vlbench.errors import UserError
from vlbench.garbage_collection import pause_garbage_collection
from vlbench.train.run_results_file import read_results
from vlbench.verbs import resolve_recipe


@dataclass(frozen=True)
class TrainedRun:
    """A finished run."""

    folder: Path
    """What `vlbench.load`, `chat`, `eval` and `report` take."""
    results: dict[str, Any]
    """The contents of results.json: accuracies, loss, seconds, budget."""


def fit_keys(keys: Mapping[str, Any]) -> TrainedRun | None:
    """Train the recipe that `keys` describe and evaluate it, as the verb `fit` does.

    Returns None after a dry run, and in all processes but the first.

    Raises:
        UserError: a key or a file is wrong; nothing was trained.
        KeyboardInterrupt: the run was stopped, and has saved; with `run=` it goes on.
    """
    words = list(_override_words(keys))
    recipe = recipes.load_recipe(words)
    recipes.require_data(recipe.size, recipe.selected_data)
    check_machine_limits(recipe.trainer, recipe.data_by_key, is_launched())
    with pause_garbage_collection():
        from vlbench.fit_command import train_and_evaluate  # here: it imports torch

    _, run = train_and_evaluate(resolve_recipe(words))
    if run is None:
        return None
    if not run.is_finished:
        raise KeyboardInterrupt(f"{run.folder} was stopped and has saved; run= goes on with it")
    return TrainedRun(run.folder, read_results(run.results_file))


def _override_words(keys: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield `a.b=c` words of nested mappings, of keys with dots, or of both."""
    for name, value in keys.items():
        if not isinstance(name, str):
            raise UserError(f"{prefix}{name!r} is no key of a recipe; keys are text")
        key = f"{prefix}{name.rstrip('_')}"
        if isinstance(value, Mapping) and value:
            yield from _override_words(value, f"{key}.")
        else:
            yield format_override(key, value)
