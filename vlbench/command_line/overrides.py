"""Keys with dots: `a.b=value` words of a command line, nested mappings, and back."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

from vlbench.strict_values import RawText, parse_flow_yaml, yaml_text


def parse_overrides(overrides: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """Return `a.b=c` words as nested mappings of `RawText`, and what is wrong with them."""
    tree: dict[str, Any] = {}
    errors: list[str] = []
    given: list[str] = []
    for word in overrides:
        key, equals, value = word.partition("=")
        if word.encode(errors="replace").decode() != word:
            errors.append(f"{ascii(word)} is not UTF-8 text, and a recipe is written as that")
        elif not equals or not all(key.split(".")):
            errors.append(f"'{word}' is not KEY=VALUE, as in stages.chat.steps=10")
        elif not value:
            errors.append(f"{key} has no value; write {key}=VALUE, or {key}=null for none")
        elif key in given:
            errors.append(f"{key} is given twice")
        elif any(one.startswith(f"{key}.") or key.startswith(f"{one}.") for one in given):
            errors.append(f"{key} is given as a whole and in parts; give one of them")
        else:
            _set_leaf(tree, key.split("."), value)
            given.append(key)
    return tree, errors


def _set_leaf(node: dict[str, Any], path: list[str], text: str) -> None:
    """Set a value; a typed `{a: 1}` is a mapping, and one that cannot be read stays text."""
    for name in path[:-1]:
        node = node.setdefault(name, {})
    node[path[-1]] = RawText(text)
    if text.startswith("{"):
        with contextlib.suppress(ValueError):
            node[path[-1]] = parse_flow_yaml(text)


def flatten_keys(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings with one key for every value: `stages.chat.steps` -> 450."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        is_leaf = not value or not isinstance(value, dict)
        result |= {prefix + key: value} if is_leaf else flatten_keys(value, f"{prefix}{key}.")
    return result


def format_override(key: str, value: object) -> str:
    """Return `key=value` as it is typed on a command line."""
    return f"{key}={yaml_text(value)}"


def shorten_keys(keys: Iterable[str]) -> dict[str, str]:
    """Return key -> its last two parts; the whole key where another one has the same."""
    endings = {key: ".".join(key.split(".")[-2:]) for key in keys}
    counts = Counter(endings.values())
    return {key: ending if counts[ending] == 1 else key for key, ending in endings.items()}
