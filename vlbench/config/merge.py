"""Layers of a recipe: merge them, check what only the whole can tell, build, compare."""

from __future__ import annotations

import dataclasses
from typing import Any, cast, get_args, get_origin

from vlbench.config import encoder_names
from vlbench.config.convert import format_value, split_union
from vlbench.config.schema import declared_keys
from vlbench.connector import registry
from vlbench.errors import suggest_name

EXCLUSIVE_KEYS = (("epochs", "steps"), ("train", "mix"), ("only", "from"))
"""Pairs of keys of one mapping of which one at most has a value."""
RESUMABLE_KEYS = ("trainer", "log", "run", "dry_run", "profile")
"""Keys that a run may change when it is resumed; so may `workers` of any data."""


def merge_layers(base: dict[str, Any], override: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Return `under` with the values of `over`, mapping by mapping."""
    result = dict(base)
    if path == "connector" and override.get("name") not in (None, base.get("name")):
        result = {}  # the options belong to another connector
    for one, other in (*EXCLUSIVE_KEYS, *(pair[::-1] for pair in EXCLUSIVE_KEYS)):
        if (
            _is_leaf(override.get(one))
            and override.get(other) is None
            and _is_leaf(base.get(other))
        ):
            result[other] = None
    for name, value in override.items():
        inside = f"{path}.{name}" if path else name
        both = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = merge_layers(result[name], value, inside) if both else value
    if not path and (override.get("data") or {}).get(
        "train", (override.get("data") or {}).get("mix")
    ):
        _drop_stage_data(result, override)
    return result


def complete_and_check(tree: dict[str, Any], require_complete: bool) -> list[str]:
    """Complete the merged `tree` in place and return its mistakes that no single layer can have."""
    mistakes: list[str] = []
    connector = tree.get("connector")
    if connector and "name" in connector:
        given = {key: value for key, value in connector.items() if key != "name"}
        values, mistakes = registry.resolve_options(connector["name"], given)
        tree["connector"] = {"name": connector["name"], **values}
    elif require_complete:
        mistakes.append(
            f"connector.name is missing; known: {', '.join(registry.connector_locations())}"
        )
    vision, language = tree.get("vision") or {}, tree.get("language") or {}
    mistakes += encoder_names.check_encoder_name(
        vision.get("name", "tiny")
    ) or _check_embedded_weights("vision", vision)
    mistakes += _check_embedded_weights("language", language)
    stages = tree.get("stages") or {}
    for name, stage in stages.items():
        mistakes += _complete_stage(
            f"stages.{name}", stage, tree.get("data") or {}, require_complete
        )
    if require_complete and not stages:
        mistakes.append("stages is missing; a recipe has at least one")
    mistakes += _check_exclusive_keys("", tree) + _check_exclusive_keys(
        "data.", tree.get("data") or {}
    )
    return mistakes + _check_stage_names(tree, list(stages))


def build_dataclass(cls: type, tree: dict[str, Any], errors: list[str], prefix: str = "") -> Any:
    """Return the dataclass `cls` filled from a checked tree; what is missing goes to `mistakes`."""
    values: dict[str, Any] = {}
    for name, (kind, field) in declared_keys(cls).items():
        if name in tree:
            values[field.name] = _build_value(tree[name], kind, errors, f"{prefix}{name}")
        elif dataclasses.MISSING is field.default is field.default_factory:
            errors.append(f"{prefix}{name} is missing: {field.metadata['help']}")
            values[field.name] = None
    return cls(**values)


def to_plain(value: Any) -> Any:
    """Return a recipe, or a part of one, as nested dicts and lists with the keys of YAML."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = declared_keys(type(value)).items()
        return {name: to_plain(getattr(value, field.name)) for name, (_, field) in found}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, tuple | list) else value


def differing_keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return what differs between two plain recipes, but not what a resumed run may change."""
    one, other = flatten_keys(before), flatten_keys(now)
    lines = []
    for key in dict.fromkeys([*one, *other]):
        free = key.split(".")[0] in RESUMABLE_KEYS or key.endswith("data.workers")
        if not free and one.get(key) != other.get(key):
            lines.append(
                f"{key} ({format_value(one.get(key))} before, {format_value(other.get(key))} now)"
            )
    return lines


def _is_leaf(value: Any) -> bool:
    # `train` is also the name of a stage's mapping of parts, which has no rival.
    return value is not None and not isinstance(value, dict)


def _drop_stage_data(result: dict[str, Any], override: dict[str, Any]) -> None:
    """Let `data.train` or `data.mix` of a later layer replace the sources of every stage."""
    given = override.get("stages") or {}
    stages = result.get("stages") or {}
    for name, stage in stages.items():
        if stage and not (given.get(name) or {}).get("data"):
            stages[name] = {**stage, "data": None}


def _check_embedded_weights(part: str, tree: dict[str, Any]) -> list[str]:
    name = tree.get("name", "tiny")
    with_own = list(encoder_names.EMBEDDED_ENCODERS) if part == "vision" else ["tiny"]
    if tree.get("weights", "embedded") != "embedded" or name in with_own:
        return []
    own = " and ".join(f"{part}.name={one}" for one in with_own)
    return [
        f"{part}.weights is 'embedded', which only {own} can have; "
        f"say which weights {part}.name={name} takes, or {part}.weights=random"
    ]


def _complete_stage(
    path: str, stage: dict[str, Any], data: dict[str, Any], require_complete: bool
) -> list[str]:
    stage["train"] = {p: how for p, how in (stage.get("train") or {}).items() if how is not None}
    mistakes = _check_exclusive_keys(f"{path}.", stage) + _check_adapters(path, stage["train"])
    if require_complete and stage.get("epochs") is None and stage.get("steps") is None:
        mistakes.append(f"{path} needs epochs or steps")
    if stage.get("data"):
        mistakes += _check_exclusive_keys(f"{path}.data.", stage["data"])
        stage["data"] = merge_layers(data, stage["data"], f"{path}.data")
        own, whole = (one.get("decode", "exact") for one in (stage["data"], data))
        if own != whole:
            mistakes.append(
                f"{path}.data.decode is {own} and data.decode {whole}: a run has one way to decode "
                "pictures, in training and after it; give data.decode"
            )
    return mistakes


def _check_adapters(path: str, train: dict[str, Any]) -> list[str]:
    lines = []
    for part, how in train.items():
        adapter = how.get("lora")
        if adapter is not None and part == "connector":
            lines.append(f"{path}.train.connector.lora: a connector is trained whole; leave it out")
        bits = (adapter or {}).get("bits")
        if bits not in (None, 4) or (bits == 4 and part != "language"):
            lines.append(
                f"{path}.train.{part}.lora.bits is {bits}; allowed is 4, for the language model"
            )
    return lines


def _check_exclusive_keys(path: str, tree: dict[str, Any]) -> list[str]:
    both = [
        pair
        for pair in EXCLUSIVE_KEYS
        if _is_leaf(tree.get(pair[0])) and _is_leaf(tree.get(pair[1]))
    ]
    return [f"{path}{one} and {path}{other}: give one of them, not both" for one, other in both]


def _check_stage_names(tree: dict[str, Any], stages: list[str]) -> list[str]:
    chosen = [("only", name) for name in tree.get("only") or ()]
    chosen += [("from", tree["from"])] if tree.get("from") else []
    return [
        f"{key}: no stage '{name}'; stages: {', '.join(stages)}.{suggest_name(name, stages)}"
        for key, name in chosen
        if name not in stages and stages
    ]


def _build_value(value: Any, kind: Any, errors: list[str], path: str) -> Any:
    inner = split_union(kind)[0][0]
    if value is None:
        return None
    if dataclasses.is_dataclass(inner):
        return build_dataclass(cast(type, inner), value, errors, f"{path}.")
    if get_origin(inner) is dict and get_args(inner)[1] is not Any:
        item_kind = get_args(inner)[1]
        return {k: _build_value(v, item_kind, errors, f"{path}.{k}") for k, v in value.items()}
    if get_origin(inner) is tuple and dataclasses.is_dataclass(get_args(inner)[0]):
        return tuple(
            build_dataclass(get_args(inner)[0], item, errors, f"{path}.") for item in value
        )
    return value


def flatten_keys(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a plain recipe with one key for every value: `stages.chat.steps` -> 450."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            result |= flatten_keys(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result
