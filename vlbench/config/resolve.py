"""Layers of a recipe, merged by rules and checked as a whole; one line for each error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from vlbench.config.data_schema import read_mixture
from vlbench.config.key_table import key_rows
from vlbench.config.key_types import EXCLUSIVE_KEYS
from vlbench.config.schema import Recipe
from vlbench.connector import registry
from vlbench.errors import UserError
from vlbench.key_errors import key_error_line, primary_errors
from vlbench.strict_values import is_null

RecipeLayer = tuple[str, dict[str, Any]]
"""A layer's name in messages ("" for the command line), and its tree of keys."""


def check_merged(
    merged: dict[str, Any],
    layers: Sequence[RecipeLayer],
    errors: list[str],
    has_all_options: bool = False,
    is_saved: bool = False,
) -> Recipe:
    """Return the recipe of the merged `layers`; a UserError has a line for each error.

    After earlier `errors` nothing is said of what is missing: a recipe whose file is not there
    lacks everything. `merged` is changed.

    Args:
        merged: All layers in one tree.
        layers: The same one by one, for messages.
        errors: What was wrong before.
        has_all_options: Whether the connector's options were resolved when the recipe was saved;
            its source is then not looked at.
        is_saved: Whether a checkpoint keeps the recipe, and with it what its encoders are: the
            folders that they began as may be gone.
    """
    is_complete = not errors
    if not has_all_options:
        errors += _resolve_connector(merged, is_complete)
    common = mapping_in(merged, "data")
    _read_mixture(common, "data.mix", errors)
    for name, stage in _stages_in(merged).items():
        if own := mapping_in(stage, "data"):  # what the stage leaves out is as for all
            _read_mixture(own, f"stages.{name}.data.mix", errors)
            stage["data"] = _merge_into(dict(common), own)
    stages = next((known for _, tree in layers if (known := mapping_in(tree, "stages"))), {})
    try:
        recipe = Recipe.model_validate(
            merged, context={"stage_names": list(stages), "is_saved": is_saved}
        )
    except ValidationError as error:
        errors += _error_lines(error, layers, is_complete)
    if errors:
        raise UserError(*dict.fromkeys(errors))
    return recipe


def merge_layers(*layers: dict[str, Any]) -> dict[str, Any]:
    """Return a new tree with the values of all layers, mapping by mapping; a later layer wins.

    A key replaces the one that excludes it (`epochs` the `steps` of a lower layer), another
    connector drops the options of the first, and new data replace those of every stage. These rules
    are beyond `OmegaConf.merge`, which also interprets `${`.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        connector, data = mapping_in(layer, "connector"), mapping_in(layer, "data")
        if connector.get("name") not in (None, mapping_in(merged, "connector").get("name")):
            merged["connector"] = {}
        if not is_null(data.get("train", data.get("mix"))):
            given = _stages_in(layer)
            for name, stage in _stages_in(merged).items():
                if not mapping_in(given.get(name, {}), "data"):
                    stage["data"] = None
        _merge_into(merged, layer)
    return merged


def _merge_into(target: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    """Change `target` to have the values of `layer`, whose mappings are copied; return it."""
    for pair in EXCLUSIVE_KEYS:
        for key, rival in (pair, pair[::-1]):
            if rival in target and not is_null(layer.get(key)):
                target[rival] = None
    for name, value in layer.items():
        is_mapping = isinstance(value, dict)
        target[name] = _merge_into(dict(mapping_in(target, name)), value) if is_mapping else value
    return target


def mapping_in(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the mapping under `key` of a tree that is not checked yet; {} where there is none."""
    value = tree.get(key)
    return value if isinstance(value, dict) else {}


def _stages_in(tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the stages of a tree that is not checked yet, without those that are no mappings."""
    stages = mapping_in(tree, "stages")
    return {name: stage for name, stage in stages.items() if isinstance(stage, dict)}


@contextlib.contextmanager
def collect_errors(errors: list[str]) -> Iterator[None]:
    """Add the lines of a UserError to `errors`, to be raised with others."""
    try:
        yield
    except UserError as error:
        errors += error.lines


def _read_mixture(data: dict[str, Any], key: str, errors: list[str]) -> None:
    """Put the sources of a mixture's file where `data` names it."""
    name = data.get("mix")
    if isinstance(name, str) and not is_null(name) and not name.startswith(("[", "{")):
        data["mix"] = None
        with collect_errors(errors):
            data["mix"] = read_mixture(name, key)


def _resolve_connector(merged: dict[str, Any], is_complete: bool) -> list[str]:
    """Give the connector of a recipe all its options; return what is wrong with them."""
    given = merged.setdefault("connector", {})
    if not isinstance(given, dict):
        return []  # the schema refuses it
    merged["connector"] = {}
    if "name" not in given:
        known = ", ".join(registry.connector_locations())
        return [f"connector.name is missing; known: {known}"] * is_complete
    name = str(given.pop("name"))
    values, errors = registry.resolve_options(name, given)
    merged["connector"] = {"name": name, **values}
    return errors


def _error_lines(
    error: ValidationError, layers: Sequence[RecipeLayer], is_complete: bool
) -> Iterator[str]:
    """Yield a line for each of pydantic's errors, with the name of the layer that it is in."""
    errors, all_keys = list(primary_errors(error)), {row.name: row.help for row in key_rows()}
    wrong_names = {one["loc"][:-1] for one in errors if one["loc"][-1:] == ("[key]",)}
    for details in errors:
        path = details["loc"]
        line = key_error_line(Recipe, details, "the recipe", all_keys=all_keys)
        if details["type"] == "missing":
            if is_complete and not any(path[: len(name)] == name for name in wrong_names):
                yield line
            continue
        path = path[:-1] if path[-1:] == ("[key]",) else path
        source = next((name for name, tree in reversed(layers) if _has_path(tree, path)), None)
        if source is not None:  # else a stage has it from the common `data`, where it is told
            yield f"{source}: {line}" if source else line


def _has_path(tree: object, path: Sequence[int | str]) -> bool:
    """Tell whether a layer has the key at `path`, or a value above it that is no mapping."""
    if path and isinstance(tree, dict):
        return path[0] in tree and _has_path(tree[path[0]], path[1:])
    return not path or tree is not None
