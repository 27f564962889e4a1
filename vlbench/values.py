"""One value of a recipe: text of the command line, or a YAML value, turned into a declared type.

A *kind* is a type as it stands in an annotation: `int`, `float`, `bool`, `str`, `Literal[...]`,
`tuple[float, float]`, `tuple[str, ...]`, any of them `| None`, or `Any` where none is declared.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from vlbench.mistakes import nearest

WHOLE = re.compile(r"[+-]?\d+")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
NULL = ("null", "none")
BOOLS = {"true": True, "false": False}


class Text(str):
    """A value typed on the command line: raw, to be read by the declared type of its key."""


def convert(value: object, kind: Any) -> Any:
    """Return `value` as `kind`; a ValueError says what is allowed and what was given."""
    inner, optional = unwrap(kind)
    if optional and (value is None or (isinstance(value, Text) and value in NULL)):
        return None
    if isinstance(value, str) and "${" in value:
        raise ValueError(f"holds '${{' in '{value}'; values are taken as written, not interpolated")
    for one in inner:
        result = _convert(value, one)
        if result is not None:
            return result
    raise ValueError(f"must be {describe(kind)}, given {show(value)}{_hint(value, inner)}")


def unwrap(kind: Any) -> tuple[list[Any], bool]:
    """Split `A | B | None` into `[A, B]` and whether None is allowed."""
    if get_origin(kind) not in (Union, types.UnionType):
        return [kind], kind is Any
    inner = [one for one in get_args(kind) if one is not type(None)]
    return inner, len(inner) < len(get_args(kind))


def describe(kind: Any) -> str:
    """Say in words what `kind` allows."""
    inner, optional = unwrap(kind)
    return " or ".join([_describe(one) for one in inner] + (["null"] if optional else []))


def label(kind: Any) -> str:
    """Return `kind` in a word or two, for tables."""
    inner, optional = unwrap(kind)
    return " | ".join([_label(one) for one in inner] + (["null"] if optional else []))


def show(value: object) -> str:
    """Return `value` as it should stand in a message."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, dict):
        return "a mapping"
    return f"'{value}'" if isinstance(value, str) else str(value)


def flow(text: str) -> Any:
    """Return `{a: 1, b: {c: 2}}`, `[a, b]` or `a,b` with every scalar left as `Text`."""
    if not text.startswith(("{", "[")):
        return [Text(part.strip()) for part in text.split(",")]
    try:
        return _plain(yaml.compose(text, Loader=yaml.BaseLoader))
    except yaml.YAMLError as error:
        raise ValueError(f"cannot be read: '{text}' ({getattr(error, 'problem', error)})") from None


def _plain(node: Any) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_plain(one) for one in node.value]
    if not isinstance(node, yaml.MappingNode):
        return Text(node.value)
    result: dict[str, Any] = {}
    for key, value in node.value:
        name, content = str(key.value), _plain(value)
        if content == "":  # `{depth:3}`, which YAML takes for a name without a value
            name, _, rest = name.partition(":")
            content = Text(rest)
        if name in result:
            raise ValueError(f"has '{name}' twice")
        result[name] = content
    return result


def _convert(value: object, kind: Any) -> Any:
    """Return `value` as `kind` (not a union), or None where it cannot be."""
    if get_origin(kind) is tuple:
        return _items(value, get_args(kind))
    if isinstance(value, Text) and kind is Any:
        return _guess(value)
    if isinstance(value, Text) and kind in FROM_TEXT:
        return FROM_TEXT[kind](value)
    if get_origin(kind) is Literal:
        return next((c for c in get_args(kind) if _same(value, c)), None)
    if kind is float:
        return _finite(value)
    if kind is int:
        return value if isinstance(value, int) and not isinstance(value, bool) else None
    return value if kind is Any or isinstance(value, kind) else None


def _same(value: object, choice: object) -> bool:
    # A choice such as precision "32" may stand in YAML without quotes; true and 1 stay apart.
    return (
        not isinstance(value, bool | list | dict) and str(value) == str(choice) or value is choice
    )


def _finite(value: object) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None  # type: ignore[arg-type]


def _items(value: object, kinds: tuple[Any, ...]) -> tuple[Any, ...] | None:
    items = flow(value) if isinstance(value, Text) else value
    if isinstance(items, str) and kinds[0] is str:
        items = [items]  # one name where several may stand
    if not isinstance(items, list | tuple):
        return None
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(items)
    if len(items) != len(kinds) or not items:
        return None
    found = tuple(_convert(item, kind) for item, kind in zip(items, kinds, strict=True))
    return None if None in found else found


def _text(value: str) -> str | None:
    return str(value) or None


def _int(value: str) -> int | None:
    return int(value) if WHOLE.fullmatch(value) else None


def _float(value: str) -> float | None:
    return _finite(float(value)) if NUMBER.fullmatch(value) else None


def _guess(value: str) -> Any:
    """Read a value whose type nobody declared."""
    readers = (BOOLS.get, _int, _float, _text)
    return next((found for read in readers if (found := read(value)) is not None), None)


FROM_TEXT: dict[Any, Callable[[str], Any]] = {
    str: _text,
    int: _int,
    float: _float,
    bool: BOOLS.get,
}


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        args = get_args(kind)
        count = "" if args[-1] is Ellipsis else f"{len(args)} of "
        return f"a list ({count}{_label(args[0])}), as [a,b] or a,b"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(kind, "a value")


def _label(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " | ".join(str(one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return f"[{_label(get_args(kind)[0])}, ...]"
    return "any" if kind is Any else str(getattr(kind, "__name__", kind))


def _hint(value: object, inner: list[Any]) -> str:
    """Return the nearest spelling that would have been right, if one is plain."""
    choices = [str(one) for kind in inner if get_origin(kind) is Literal for one in get_args(kind)]
    if choices and isinstance(value, str):
        found = nearest(value, choices)
        return f".{found}" if found else ""
    if not isinstance(value, str | float) or int not in inner:
        return ""
    number = _float(str(value)) if NUMBER.fullmatch(str(value)) else None
    return f"; write {int(number)}" if number is not None and number == int(number) else ""
