"""The layers of a recipe merged and checked as a whole; what is wrong, one line for each error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from vlbench.config.merge import fill_stage_data, mapping_in, merge_layers
from vlbench.config.schema import Recipe, declared_keys, key_rows, section_at
from vlbench.connector import registry
from vlbench.errors import UserError, suggest_name
from vlbench.strict_values import describe_error, format_value, join_path

RecipeLayer = tuple[str, dict[str, Any]]
"""A layer's name in messages ("" for the command line), and its tree of keys."""


def validate_layers(
    layers: Sequence[RecipeLayer], errors: list[str], stage_names: Sequence[str] = ()
) -> Recipe:
    """Merge the layers, a later one wins, and check the whole.

    Args:
        layers: Name and tree of each.
        errors: What is wrong so far. A recipe whose file is not there lacks everything, so that
            nothing is said of what is missing.
        stage_names: The stages that the recipe has; none: those of the merged layers.
    """
    is_complete = not errors
    merged: dict[str, Any] = {}
    for _, layer in layers:
        merged = merge_layers(merged, layer)
    merged["connector"], option_errors = _resolve_connector(merged.get("connector"), is_complete)
    names = list(stage_names) or list(mapping_in(merged, "stages"))
    try:
        recipe = Recipe.model_validate(fill_stage_data(merged), context={"stage_names": names})
    except ValidationError as error:
        errors += _error_lines(error.errors(), layers, is_complete)
    errors += option_errors
    if errors:
        raise UserError("\n".join(dict.fromkeys(errors)))
    return recipe


def _resolve_connector(given: object, is_complete: bool) -> tuple[dict[str, Any], list[str]]:
    """Return the connector's name with all its options, and what is wrong with them."""
    if given is not None and not isinstance(given, dict):
        mapping = f"must be a mapping as {{name: NAME}}, given {format_value(given)}"
        return {}, [f"connector {mapping}"]
    options = dict(given or {})
    name = options.pop("name", None)
    if name is None:
        known = ", ".join(registry.connector_locations())
        return {}, [f"connector.name is missing; known: {known}"] * is_complete
    values, errors = registry.resolve_options(str(name), options)
    return {"name": str(name), **values}, errors


def _error_lines(
    errors: Sequence[ErrorDetails], layers: Sequence[RecipeLayer], is_complete: bool
) -> list[str]:
    """Return a line for each of pydantic's errors, with the name of the layer that it is in."""
    unknown = [error["loc"][:-1] for error in errors if error["loc"][-1:] == ("[key]",)]
    lines = []
    for error in errors:
        path = error["loc"]
        if error["type"] == "missing":
            if is_complete and not any(path[: len(name)] == name for name in unknown):
                lines.append(_missing_line(path))
            continue
        path = path[:-1] if path[-1:] == ("[key]",) else path
        source = next((name for name, tree in reversed(layers) if _has_path(tree, path)), None)
        if source is not None:  # else a stage has it from the common `data`, where it is told
            lines.append((f"{source}: " if source else "") + _error_line(error))
    return lines


def _error_line(error: ErrorDetails) -> str:
    *parents, key = error["loc"] or ("",)
    if error["type"] != "extra_forbidden":
        is_name = key == "[key]"
        name = f"a key of {join_path(parents[:-1])}" if is_name else join_path(error["loc"])
        return f"{name or 'the recipe'} {describe_error(error)}"
    declared = declared_keys(section_at(parents))
    elsewhere = [row.name for row in key_rows() if row.name.endswith(f".{key}")]
    close = f" Did you mean '{elsewhere[0]}'?" if elsewhere else suggest_name(str(key), declared)
    takes = f"{join_path(parents)} takes" if parents else "keys are"
    return f"unknown key '{join_path(error['loc'])}'; {takes}: {', '.join(declared)}.{close}"


def _missing_line(path: Sequence[int | str]) -> str:
    if isinstance(path[-1], int):
        return f"{join_path(path[:-1])} has only {path[-1]} of its values"
    meaning = declared_keys(section_at(path[:-1]))[path[-1]].description
    return f"{join_path(path)} is missing: {meaning}"


def _has_path(tree: object, path: Sequence[int | str]) -> bool:
    """Tell whether a layer has the key at `path`, or a value above it that is no mapping."""
    for part in path:
        if not isinstance(tree, dict):
            return tree is not None
        if part not in tree:
            return False
        tree = tree[part]
    return True
