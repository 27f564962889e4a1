"""Layers of a recipe: merge them, check what only the whole can tell, build, compare."""

from __future__ import annotations

import dataclasses
from typing import Any, cast, get_args, get_origin

from vlbench import plugins, towers
from vlbench.mistakes import nearest
from vlbench.schema import keys
from vlbench.values import show, unwrap

RIVALS = (("epochs", "steps"), ("train", "mix"), ("only", "from"))
"""Pairs of keys of one mapping of which one at most has a value."""
FREE = ("trainer", "log", "run", "dry_run", "profile")
"""Keys that a run may change when it is resumed; so may `workers` of any data."""


def merge(under: dict[str, Any], over: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Return `under` with the values of `over`, mapping by mapping."""
    result = dict(under)
    if path == "connector" and over.get("name") not in (None, under.get("name")):
        result = {}  # the options belong to another connector
    for one, other in (*RIVALS, *(pair[::-1] for pair in RIVALS)):
        if _leaf(over.get(one)) and over.get(other) is None and _leaf(under.get(other)):
            result[other] = None
    for name, value in over.items():
        inside = f"{path}.{name}" if path else name
        both = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = merge(result[name], value, inside) if both else value
    if not path and (over.get("data") or {}).get("train", (over.get("data") or {}).get("mix")):
        _drop_stage_data(result, over)
    return result


def checked(tree: dict[str, Any], complete: bool) -> list[str]:
    """Complete the merged `tree` in place and return its mistakes that no single layer can have."""
    mistakes: list[str] = []
    connector = tree.get("connector")
    if connector and "name" in connector:
        given = {key: value for key, value in connector.items() if key != "name"}
        values, mistakes = plugins.settle(connector["name"], given)
        tree["connector"] = {"name": connector["name"], **values}
    elif complete:
        mistakes.append(f"connector.name is missing; known: {', '.join(plugins.sources())}")
    vision, language = tree.get("vision") or {}, tree.get("language") or {}
    mistakes += towers.check(vision.get("name", "tiny")) or _weights("vision", vision)
    mistakes += _weights("language", language)
    stages = tree.get("stages") or {}
    for name, stage in stages.items():
        mistakes += _stage(f"stages.{name}", stage, tree.get("data") or {}, complete)
    if complete and not stages:
        mistakes.append("stages is missing; a recipe has at least one")
    mistakes += _rivals("", tree) + _rivals("data.", tree.get("data") or {})
    return mistakes + _chosen(tree, list(stages))


def build(cls: type, tree: dict[str, Any], mistakes: list[str], path: str = "") -> Any:
    """Return the dataclass `cls` filled from a checked tree; what is missing goes to `mistakes`."""
    values: dict[str, Any] = {}
    for name, (kind, field) in keys(cls).items():
        if name in tree:
            values[field.name] = _built(tree[name], kind, mistakes, f"{path}{name}")
        elif dataclasses.MISSING is field.default is field.default_factory:
            mistakes.append(f"{path}{name} is missing: {field.metadata['help']}")
            values[field.name] = None
    return cls(**values)


def plain(value: Any) -> Any:
    """Return a recipe, or a part of one, as nested dicts and lists with the keys of YAML."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = keys(type(value)).items()
        return {name: plain(getattr(value, field.name)) for name, (_, field) in found}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return what differs between two plain recipes, but not what a resumed run may change."""
    one, other = flat(before), flat(now)
    lines = []
    for key in dict.fromkeys([*one, *other]):
        free = key.split(".")[0] in FREE or key.endswith("data.workers")
        if not free and one.get(key) != other.get(key):
            lines.append(f"{key} ({show(one.get(key))} before, {show(other.get(key))} now)")
    return lines


def _leaf(value: Any) -> bool:
    # `train` is also the name of a stage's mapping of parts, which has no rival.
    return value is not None and not isinstance(value, dict)


def _drop_stage_data(result: dict[str, Any], over: dict[str, Any]) -> None:
    """Let `data.train` or `data.mix` of a later layer replace the sources of every stage."""
    given = over.get("stages") or {}
    stages = result.get("stages") or {}
    for name, stage in stages.items():
        if stage and not (given.get(name) or {}).get("data"):
            stages[name] = {**stage, "data": None}


def _weights(part: str, tree: dict[str, Any]) -> list[str]:
    name = tree.get("name", "tiny")
    with_own = list(towers.EMBEDDED) if part == "vision" else ["tiny"]
    if tree.get("weights", "embedded") != "embedded" or name in with_own:
        return []
    own = " and ".join(f"{part}.name={one}" for one in with_own)
    return [
        f"{part}.weights is 'embedded', which only {own} can have; "
        f"say which weights {part}.name={name} takes, or {part}.weights=random"
    ]


def _stage(path: str, stage: dict[str, Any], data: dict[str, Any], complete: bool) -> list[str]:
    stage["train"] = {p: how for p, how in (stage.get("train") or {}).items() if how is not None}
    mistakes = _rivals(f"{path}.", stage) + _adapters(path, stage["train"])
    if complete and stage.get("epochs") is None and stage.get("steps") is None:
        mistakes.append(f"{path} needs epochs or steps")
    if stage.get("data"):
        mistakes += _rivals(f"{path}.data.", stage["data"])
        stage["data"] = merge(data, stage["data"], f"{path}.data")
        own, whole = (one.get("decode", "exact") for one in (stage["data"], data))
        if own != whole:
            mistakes.append(
                f"{path}.data.decode is {own} and data.decode {whole}: a run has one way to decode "
                "pictures, in training and after it; give data.decode"
            )
    return mistakes


def _adapters(path: str, train: dict[str, Any]) -> list[str]:
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


def _rivals(path: str, tree: dict[str, Any]) -> list[str]:
    both = [pair for pair in RIVALS if _leaf(tree.get(pair[0])) and _leaf(tree.get(pair[1]))]
    return [f"{path}{one} and {path}{other}: give one of them, not both" for one, other in both]


def _chosen(tree: dict[str, Any], stages: list[str]) -> list[str]:
    chosen = [("only", name) for name in tree.get("only") or ()]
    chosen += [("from", tree["from"])] if tree.get("from") else []
    return [
        f"{key}: no stage '{name}'; stages: {', '.join(stages)}.{nearest(name, stages)}"
        for key, name in chosen
        if name not in stages and stages
    ]


def _built(value: Any, kind: Any, mistakes: list[str], path: str) -> Any:
    inner = unwrap(kind)[0][0]
    if value is None:
        return None
    if dataclasses.is_dataclass(inner):
        return build(cast(type, inner), value, mistakes, f"{path}.")
    if get_origin(inner) is dict and get_args(inner)[1] is not Any:
        item_kind = get_args(inner)[1]
        return {k: _built(v, item_kind, mistakes, f"{path}.{k}") for k, v in value.items()}
    if get_origin(inner) is tuple and dataclasses.is_dataclass(get_args(inner)[0]):
        return tuple(build(get_args(inner)[0], item, mistakes, f"{path}.") for item in value)
    return value


def flat(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Return a plain recipe with one key for every value: `stages.chat.steps` -> 450."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            result |= flat(value, f"{path}{key}.")
        else:
            result[f"{path}{key}"] = value
    return result
