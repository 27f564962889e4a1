"""`key=value` words of the command line as nested mappings; values stay text."""

from __future__ import annotations

import contextlib
import math
from typing import Any

from vlbench.errors import UserError, suggest_name
from vlbench.strict_values import INTEGER_PATTERN, RawText, parse_flow_yaml, yaml_text


def parse_overrides(overrides: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return `a.b=c` words as nested mappings of `RawText`, and what is wrong with them."""
    result: dict[str, Any] = {}
    errors: list[str] = []
    for word in overrides:
        key, equals, value = word.partition("=")
        if word.encode(errors="replace").decode() != word:
            errors.append(f"{ascii(word)} is not UTF-8 text, and a recipe is written as that")
        elif not equals or not all(key.split(".")):
            errors.append(f"'{word}' is not KEY=VALUE, as in stages.chat.steps=10")
        elif not value:
            errors.append(f"{key} has no value; write {key}=VALUE, or {key}=null for none")
        elif conflict := _set_leaf(result, key.split("."), RawText(value)):
            errors.append(f"{key} is given {conflict}")
    return result, errors


def _set_leaf(node: dict[str, Any], path: list[str], value: RawText) -> str:
    """Set a value; return how it conflicts with one that was given before, or ""."""
    for name in path[:-1]:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            return "as a whole and in parts; give one of them"
    if path[-1] in node:
        again = not isinstance(node[path[-1]], dict)
        return "twice" if again else "as a whole and in parts; give one of them"
    node[path[-1]] = value
    return ""


def open_mappings(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a tree in which a typed `{a: 1}` is a mapping; what cannot be read stays text."""
    result = dict(tree)
    for name, value in tree.items():
        if isinstance(value, RawText) and value.startswith("{"):
            with contextlib.suppress(ValueError):
                value = parse_flow_yaml(value)
        result[name] = open_mappings(value) if isinstance(value, dict) else value
    return result


def format_override(key: str, value: object) -> str:
    """Return `key=value` as it is typed on a command line."""
    return f"{key}={yaml_text(value)}"


def read_number(
    options: dict[str, str], key: str, default: float, low: float, high: float
) -> float:
    """Return the number that `given` has under `key`; a Mistake if it has another thing there."""
    text = options.get(key)
    try:
        value = default if text is None else float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise UserError(f"{key} is '{text}'; allowed are numbers from {low:g} to {high:g}")
    return value


def read_integer(options: dict[str, str], key: str, default: int, low: int, high: int) -> int:
    """Return the whole number that `given` has under `key`; a Mistake for anything else."""
    text = options.get(key, str(default))
    if not INTEGER_PATTERN.fullmatch(text) or not low <= int(text) <= high:
        raise UserError(f"{key} is '{text}'; allowed are whole numbers from {low} to {high}")
    return int(text)


def read_boolean(options: dict[str, str], key: str) -> bool:
    """Return whether `given` has true under `key`; a Mistake for anything but true and false."""
    text = options.get(key, "false")
    if text not in ("true", "false"):
        raise UserError(f"{key} is '{text}'; allowed are true and false")
    return text == "true"


def parse_key_values(
    verb: str,
    overrides: list[str],
    required_keys: tuple[str, ...],
    optional_keys: tuple[str, ...] = (),
) -> dict[str, str]:
    """Return the `key=value` words of a verb that has few keys; values stay as they were typed."""
    known = (*required_keys, *optional_keys)
    given: dict[str, str] = {}
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals or key not in known:
            takes = ", ".join(f"{name}=..." for name in known)
            raise UserError(f"{verb} takes {takes}; given was '{word}'.{suggest_name(key, known)}")
        if key in given:
            raise UserError(f"{key} is given twice, as '{given[key]}' and '{value}'")
        if not value and key in optional_keys:
            raise UserError(f"{key} has no value; write {key}=VALUE, or leave it out")
        given[key] = value
    missing = [f"{name}=..." for name in required_keys if not given.get(name)]
    if missing:
        raise UserError(f"{verb} needs {' and '.join(missing)}")
    return given
