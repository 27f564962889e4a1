"""Layers of a recipe as nested dicts: merged by rules, and flattened to be compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlbench.config.schema import EXCLUSIVE_KEYS
from vlbench.strict_values import format_value, is_null

RESUMABLE_KEYS = ("trainer", "log", "run", "dry_run", "profile")
"""Keys that a run may change when it is resumed; so may `workers` of any data."""


def merge_layers(base: dict[str, Any], override: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Return `base` with the values of `override`, mapping by mapping.

    A key replaces the one that excludes it (`epochs` the `steps` of a lower layer), another
    connector leaves the options of the first, and new data replace those of every stage.
    """
    result = dict(base) if path else _drop_replaced_data(base, override)
    if path == "connector" and override.get("name") not in (None, base.get("name")):
        result = {}
    for pair in EXCLUSIVE_KEYS:
        for key, rival in (pair, pair[::-1]):
            if _has_value(override, key) and is_null(override.get(rival)):
                result |= {rival: None} if _has_value(base, rival) else {}
    for name, value in override.items():
        below = result.get(name)
        if isinstance(value, dict) and isinstance(below, dict):
            value = merge_layers(below, value, f"{path}.{name}" if path else name)
        result[name] = value
    return result


def _has_value(tree: dict[str, Any], key: str) -> bool:
    # `train` is also the name of a stage's mapping of parts, which excludes nothing.
    return not is_null(tree.get(key)) and not isinstance(tree[key], dict)


def _drop_replaced_data(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """Return `base` without the data of stages, where `override` gives all stages new data."""
    data, given = mapping_in(override, "data"), mapping_in(override, "stages")
    if is_null(data.get("train", data.get("mix"))):
        return dict(base)
    kept = [name for name in given if mapping_in(given, name).get("data")]
    return _update_stages(base, lambda name, stage: {} if name in kept else {"data": None})


def fill_stage_data(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a merged tree in which the `data` of a stage has every key of the common `data`."""
    common = mapping_in(tree, "data")

    def filled(_: str, stage: dict[str, Any]) -> dict[str, Any]:
        own = mapping_in(stage, "data")
        return {"data": merge_layers(common, own, "stages.data")} if own else {}

    return _update_stages(tree, filled)


def _update_stages(
    tree: dict[str, Any], changes: Callable[[str, dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    stages = mapping_in(tree, "stages")
    mappings = {name: stage for name, stage in stages.items() if isinstance(stage, dict)}
    changed = {name: stage | changes(name, stage) for name, stage in mappings.items()}
    return tree | ({"stages": stages | changed} if changed else {})


def mapping_in(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the mapping under `key` of a tree that is not checked yet; {} where there is none."""
    value = tree.get(key)
    return value if isinstance(value, dict) else {}


def flatten_keys(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a plain recipe with one key for every value: `stages.chat.steps` -> 450."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            result |= flatten_keys(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def differing_keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return what differs between two plain recipes, but not what a resumed run may change."""
    old, new = flatten_keys(before), flatten_keys(now)
    return [
        f"{key} ({format_value(old.get(key))} before, {format_value(new.get(key))} now)"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
        and key.split(".")[0] not in RESUMABLE_KEYS
        and not key.endswith("data.workers")
    ]
