"""`key=value` words of the command line as nested mappings; values stay text."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

from vlbench.strict_values import RawText, parse_flow_yaml, yaml_text


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


def shorten_keys(keys: Iterable[str]) -> dict[str, str]:
    """Return key -> its last two parts; the whole key where another one has the same."""
    endings = {key: ".".join(key.split(".")[-2:]) for key in keys}
    counts = Counter(endings.values())
    return {key: ending if counts[ending] == 1 else key for key, ending in endings.items()}
