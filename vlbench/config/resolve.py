"""Layers of a recipe, merged by rules and checked as a whole; one line for each error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from vlbench.config.key_table import declared_keys, key_rows, section_at
from vlbench.config.key_types import EXCLUSIVE_KEYS
from vlbench.config.mixture_file import read_mixture
from vlbench.config.schema import Recipe
from vlbench.connector import registry
from vlbench.errors import UserError, suggest_name
from vlbench.strict_values import describe_error, is_null, join_path

RecipeLayer = tuple[str, dict[str, Any]]
"""A layer's name in messages ("" for the command line), and its tree of keys."""


def resolve_layers(
    layers: Sequence[RecipeLayer],
    errors: list[str],
    stage_names: Sequence[str] = (),
    has_all_options: bool = False,
) -> Recipe:
    """Merge the layers, a later one wins, and check the whole.

    Args:
        layers: Name and tree of each.
        errors: What is wrong so far. A recipe whose file is not there lacks everything, so that
            nothing is said of what is missing.
        stage_names: The stages that the recipe has; none: those of the merged layers.
        has_all_options: Whether the connector's options were resolved when the recipe was saved:
            its source is not looked at then.
    """
    is_complete = not errors
    merged = merge_layers(*(tree for _, tree in layers))
    option_errors: list[str] = []
    if not has_all_options:
        given = merged.get("connector", {})
        merged["connector"], option_errors = _resolve_connector(given, is_complete)
    names = list(stage_names) or list(mapping_in(merged, "stages"))
    for place, tree in [
        ("", merged),
        *((f"stages.{n}.", s) for n, s in _stages_in(merged).items()),
    ]:
        errors += _read_mixture(place, mapping_in(tree, "data"))
    for stage in _stages_in(merged).values():
        if own := mapping_in(stage, "data"):  # what the stage leaves out is as for all
            stage["data"] = _merge_into(_merge_into({}, mapping_in(merged, "data")), own)
    try:
        recipe = Recipe.model_validate(merged, context={"stage_names": names})
    except ValidationError as error:
        errors += _error_lines(error.errors(), layers, is_complete)
    errors += option_errors
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


def _stages_in(tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the stages of a tree that is not checked yet, without those that are no mappings."""
    stages = mapping_in(tree, "stages")
    return {name: stage for name, stage in stages.items() if isinstance(stage, dict)}


def mapping_in(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the mapping under `key` of a tree that is not checked yet; {} where there is none."""
    value = tree.get(key)
    return value if isinstance(value, dict) else {}


def _read_mixture(place: str, data: dict[str, Any]) -> list[str]:
    """Put the sources of a mixture's file where `data` names it; return what is wrong with it."""
    name = data.get("mix")
    if not isinstance(name, str) or is_null(name) or name.startswith(("[", "{")):
        return []
    data["mix"] = None
    try:
        data["mix"] = read_mixture(name)
    except UserError as error:
        return [f"{place}{line}" if line.startswith("data.mix=") else line for line in error.lines]
    return []


def _resolve_connector(given: Any, is_complete: bool) -> tuple[Any, list[str]]:
    """Return the connector's name with all its options, and what is wrong with them."""
    if not isinstance(given, dict):
        return given, []  # the schema refuses it
    if "name" not in given:
        known = ", ".join(registry.connector_locations())
        return {}, [f"connector.name is missing; known: {known}"] * is_complete
    name = str(given["name"])
    options = {key: value for key, value in given.items() if key != "name"}
    values, errors = registry.resolve_options(name, options)
    return {"name": name, **values}, errors


def _error_lines(
    errors: Sequence[ErrorDetails], layers: Sequence[RecipeLayer], is_complete: bool
) -> list[str]:
    """Return a line for each of pydantic's errors, with the name of the layer that it is in."""
    paths = [error["loc"] for error in errors]
    above = {path[:length] for path in paths for length in range(len(path))}
    wrong_names = {path[:-1] for path in paths if path[-1:] == ("[key]",)}
    lines = []
    for error, path in zip(errors, paths, strict=True):
        if error["type"] == "too_short" and path in above:
            continue  # it has items, and what is wrong with them is said
        if error["type"] == "missing":
            if is_complete and not any(path[: len(name)] == name for name in wrong_names):
                lines.append(_error_line(error))
            continue
        path = path[:-1] if path[-1:] == ("[key]",) else path
        source = next((name for name, tree in reversed(layers) if _has_path(tree, path)), None)
        if source is not None:  # else a stage has it from the common `data`, where it is told
            lines.append((f"{source}: " if source else "") + _error_line(error))
    return lines


def _error_line(error: ErrorDetails) -> str:
    *parents, key = error["loc"] or ("",)
    name, parent = join_path(error["loc"]), join_path(parents)
    if error["type"] == "missing" and isinstance(key, int):
        return f"{parent} has only {key} of its values"
    if error["type"] == "missing":
        return f"{name} is missing: {declared_keys(section_at(parents))[str(key)].description}"
    if error["type"] == "extra_forbidden":
        declared = declared_keys(section_at(parents))
        others = [row.name for row in key_rows() if row.name.endswith(f".{key}")]
        close = f" Did you mean '{others[0]}'?" if others else suggest_name(str(key), declared)
        takes = f"{parent} takes" if parents else "keys are"
        return f"unknown key '{name}'; {takes}: {', '.join(declared)}.{close}"
    if key == "[key]":
        name = f"a key of {join_path(parents[:-1])}"
    return f"{name or 'the recipe'} {describe_error(error)}"


def _has_path(tree: object, path: Sequence[int | str]) -> bool:
    """Tell whether a layer has the key at `path`, or a value above it that is no mapping."""
    if path and isinstance(tree, dict):
        return path[0] in tree and _has_path(tree[path[0]], path[1:])
    return not path or tree is not None
