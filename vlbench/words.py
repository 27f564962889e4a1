"""The words of the command line, `key=value`, as a tree; every value stays as it was typed."""

from __future__ import annotations

import math
from typing import Any

from vlbench.mistakes import Mistake, nearest
from vlbench.values import WHOLE, Text, show


def tree(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return `a.b=c` words as nested mappings with `Text` leaves, and the mistakes in them."""
    result: dict[str, Any] = {}
    mistakes: list[str] = []
    for word in words:
        key, equals, value = word.partition("=")
        if word.encode(errors="replace").decode() != word:
            mistakes.append(f"{ascii(word)} is not UTF-8 text, and a recipe is written as that")
        elif not equals or not all(key.split(".")):
            mistakes.append(f"'{word}' is not KEY=VALUE, as in stages.chat.steps=10")
        elif not value:
            mistakes.append(f"{key} has no value; write {key}=VALUE, or {key}=null for none")
        elif wrong := _put(result, key.split("."), Text(value)):
            mistakes.append(f"{key} is given {wrong}")
    return result, mistakes


def _put(node: dict[str, Any], path: list[str], value: Text) -> str:
    """Set a leaf of the tree; return in what way it was given before, "" if it was not."""
    for name in path[:-1]:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            return "as a whole and in parts; give one of them"
    if path[-1] in node:
        again = not isinstance(node[path[-1]], dict)
        return "twice" if again else "as a whole and in parts; give one of them"
    node[path[-1]] = value
    return ""


def typed(key: str, value: object) -> str:
    """Return `key=value` as it is typed on a command line."""
    if isinstance(value, list | tuple):
        value = f"[{','.join(map(str, value))}]"
    plain = value is None or isinstance(value, bool)
    return f"{key}={show(value) if plain else value}"


def number(given: dict[str, str], key: str, default: float, low: float, high: float) -> float:
    """Return the number that `given` has under `key`; a Mistake if it has another thing there."""
    text = given.get(key)
    try:
        value = default if text is None else float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise Mistake(f"{key} is '{text}'; allowed are numbers from {low:g} to {high:g}")
    return value


def whole(given: dict[str, str], key: str, default: int, low: int, high: int) -> int:
    """Return the whole number that `given` has under `key`; a Mistake for anything else."""
    text = given.get(key, str(default))
    if not WHOLE.fullmatch(text) or not low <= int(text) <= high:
        raise Mistake(f"{key} is '{text}'; allowed are whole numbers from {low} to {high}")
    return int(text)


def truth(given: dict[str, str], key: str) -> bool:
    """Return whether `given` has true under `key`; a Mistake for anything but true and false."""
    text = given.get(key, "false")
    if text not in ("true", "false"):
        raise Mistake(f"{key} is '{text}'; allowed are true and false")
    return text == "true"


def given_keys(
    verb: str, words: list[str], needed: tuple[str, ...], optional: tuple[str, ...] = ()
) -> dict[str, str]:
    """Return the `key=value` words of a verb that has few keys; values stay as they were typed."""
    known = (*needed, *optional)
    given: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in known:
            takes = ", ".join(f"{name}=..." for name in known)
            raise Mistake(f"{verb} takes {takes}; given was '{word}'.{nearest(key, known)}")
        if key in given:
            raise Mistake(f"{key} is given twice, as '{given[key]}' and '{value}'")
        if not value and key in optional:
            raise Mistake(f"{key} has no value; write {key}=VALUE, or leave it out")
        given[key] = value
    missing = [f"{name}=..." for name in needed if not given.get(name)]
    if missing:
        raise Mistake(f"{verb} needs {' and '.join(missing)}")
    return given
