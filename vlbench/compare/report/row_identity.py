"""What makes two runs two seeds of one row: what was trained, on what; not where, or how fast.

Left out of a recipe are the keys that change nothing but rounding (devices, recomputation, the
length of packed rows), where things lie and what is logged, and all keys of stages that were not
run. What stays is the experiment: runs that agree in it are seeds of one row of a comparison.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

OUTSIDE_KEYS = ("seed", "run", "recipe", "only", "from", "dry_run", "profile", "trust_connector")
"""Top-level keys that do not say what is trained; `only` and `from` do so as `STAGES_KEY`."""
HOW_KEYS = ("activation_checkpointing", "log", "trainer")
"""Top-level keys that change times and logs, and of numbers the rounding alone."""
TRAINED_TRAINER_KEYS = ("trainer.callbacks",)
"""Of these, what may change weights all the same."""
HOW_ENDINGS = (".workers", ".on_bad_sample", ".max_tokens_per_row")
"""Endings of such keys of data and stages; samples are the same, however they are packed."""
PATH_ENDINGS = (".images", ".train", ".val", ".weights")
"""Endings of keys whose value may be a path: its spelling does not matter."""
STAGES_KEY = "only"
"""The stages that were run, None for all: a row's own, whether by `only` or by `from`."""


def row_identity(recipe: Mapping[str, Any], contents: Mapping[str, str]) -> dict[str, Any]:
    """Return what was trained, of a flattened recipe.

    `contents` are the recorded checksums of data by their path: they stand for the path.
    """
    stages = stage_names(recipe)
    run_stages = stages_that_ran(recipe)
    identity = {
        key: _identify_value(key, value, contents)
        for key, value in recipe.items()
        if _says_what_is_trained(key) and _is_of_stages(key, run_stages, stages[-1:])
    }
    return {**identity, STAGES_KEY: run_stages if run_stages != stages else None}


def identity_with_source(recipe: Mapping[str, Any], contents: Mapping[str, str]) -> dict[str, Any]:
    """Return what was trained, a connector that is not shipped told by its source."""
    identity = row_identity(recipe, contents)
    source = contents.get("connector.name")
    return identity if source is None else {**identity, "connector source": source[:12]}


def stage_names(recipe: Mapping[str, Any]) -> list[str]:
    """Return the stages of a flattened recipe, in their order."""
    return list(dict.fromkeys(key.split(".")[1] for key in recipe if key.startswith("stages.")))


def stages_that_ran(recipe: Mapping[str, Any]) -> list[str]:
    """Return the stages that `from` and `only` of a flattened recipe select, in order."""
    names, first, only = stage_names(recipe), recipe.get("from"), recipe.get("only")
    if first in names:
        names = names[names.index(first) :]
    return [name for name in names if not only or name in only]


def _says_what_is_trained(key: str) -> bool:
    top = key.split(".")[0]
    if top in HOW_KEYS:
        return key in TRAINED_TRAINER_KEYS
    return top not in OUTSIDE_KEYS and not key.endswith(HOW_ENDINGS)


def _is_of_stages(key: str, run_stages: Sequence[str], asked_stages: Sequence[str]) -> bool:
    """Tell whether a key is of no stage, of one that ran, or the data that questions are about."""
    if not key.startswith("stages."):
        return True
    _, stage, setting = key.split(".", 2)
    return stage in run_stages or (stage in asked_stages and setting.split(".")[0] == "data")


def _identify_value(key: str, value: Any, contents: Mapping[str, str]) -> Any:
    """Return a value with paths told by their contents, or else without their spelling."""
    if isinstance(value, list):  # the sources of a mixture
        return [
            {name: _identify_value(f".{name}", one, contents) for name, one in part.items()}
            if isinstance(part, dict)
            else part
            for part in value
        ]
    if not isinstance(value, str) or not (key.endswith(PATH_ENDINGS) or key == "init"):
        return value
    if value in contents:
        return f"sha {contents[value][:12]}"
    return os.path.realpath(value) if os.path.exists(value) else os.path.normpath(value)


def differing_how_keys(recipes: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    """Yield keys that change speed and rounding in which runs differ, with their values."""
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    for key in keys:
        is_setting = key.startswith("trainer.") and key not in TRAINED_TRAINER_KEYS
        if not (is_setting or key == "activation_checkpointing"):
            continue
        values = list(dict.fromkeys(str(recipe.get(key)) for recipe in recipes))
        if len(values) > 1:
            yield key, values
