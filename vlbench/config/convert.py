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

from vlbench.errors import suggest_name

INTEGER_PATTERN = re.compile(r"[+-]?\d+")
NUMBER_PATTERN = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
NULL_WORDS = ("null", "none")
BOOL_WORDS = {"true": True, "false": False}


class RawText(str):
    """A value typed on the command line: raw, to be read by the declared type of its key."""


def convert_value(value: object, kind: Any) -> Any:
    """Return `value` as `kind`; a ValueError says what is allowed and what was given."""
    inner, optional = split_union(kind)
    if optional and (value is None or (isinstance(value, RawText) and value in NULL_WORDS)):
        return None
    if isinstance(value, str) and "${" in value:
        raise ValueError(f"holds '${{' in '{value}'; values are taken as written, not interpolated")
    for one in inner:
        result = _convert_single(value, one)
        if result is not None:
            return result
    raise ValueError(
        f"must be {describe_kind(kind)}, given {format_value(value)}{_spelling_hint(value, inner)}"
    )


def split_union(kind: Any) -> tuple[list[Any], bool]:
    """Split `A | B | None` into `[A, B]` and whether None is allowed."""
    if get_origin(kind) not in (Union, types.UnionType):
        return [kind], kind is Any
    inner = [one for one in get_args(kind) if one is not type(None)]
    return inner, len(inner) < len(get_args(kind))


def describe_kind(kind: Any) -> str:
    """Say in words what `kind` allows."""
    inner, optional = split_union(kind)
    return " or ".join([_describe_single(one) for one in inner] + (["null"] if optional else []))


def kind_label(kind: Any) -> str:
    """Return `kind` in a word or two, for tables."""
    inner, optional = split_union(kind)
    return " | ".join([_label_single(one) for one in inner] + (["null"] if optional else []))


def format_value(value: object) -> str:
    """Return `value` as it should stand in a message."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, dict):
        return "a mapping"
    return f"'{value}'" if isinstance(value, str) else str(value)


def parse_flow_yaml(text: str) -> Any:
    """Return `{a: 1, b: {c: 2}}`, `[a, b]` or `a,b` with every scalar left as `Text`."""
    if not text.startswith(("{", "[")):
        return [RawText(part.strip()) for part in text.split(",")]
    try:
        return _parse_node(yaml.compose(text, Loader=yaml.BaseLoader))
    except yaml.YAMLError as error:
        raise ValueError(f"cannot be read: '{text}' ({getattr(error, 'problem', error)})") from None


def _parse_node(node: Any) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_parse_node(one) for one in node.value]
    if not isinstance(node, yaml.MappingNode):
        return RawText(node.value)
    result: dict[str, Any] = {}
    for key, value in node.value:
        name, content = str(key.value), _parse_node(value)
        if content == "":  # `{depth:3}`, which YAML takes for a name without a value
            name, _, rest = name.partition(":")
            content = RawText(rest)
        if name in result:
            raise ValueError(f"has '{name}' twice")
        result[name] = content
    return result


def _convert_single(value: object, kind: Any) -> Any:
    """Return `value` as `kind` (not a union), or None where it cannot be."""
    if get_origin(kind) is tuple:
        return _convert_items(value, get_args(kind))
    if isinstance(value, RawText) and kind is Any:
        return _guess_value(value)
    if isinstance(value, RawText) and kind in TEXT_PARSERS:
        return TEXT_PARSERS[kind](value)
    if get_origin(kind) is Literal:
        return next((c for c in get_args(kind) if _matches_choice(value, c)), None)
    if kind is float:
        return _to_finite_float(value)
    if kind is int:
        return value if isinstance(value, int) and not isinstance(value, bool) else None
    return value if kind is Any or isinstance(value, kind) else None


def _matches_choice(value: object, choice: object) -> bool:
    # A choice such as precision "32" may stand in YAML without quotes; true and 1 stay apart.
    return (
        not isinstance(value, bool | list | dict) and str(value) == str(choice) or value is choice
    )


def _to_finite_float(value: object) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None  # type: ignore[arg-type]


def _convert_items(value: object, kinds: tuple[Any, ...]) -> tuple[Any, ...] | None:
    items = parse_flow_yaml(value) if isinstance(value, RawText) else value
    if isinstance(items, str) and kinds[0] is str:
        items = [items]  # one name where several may stand
    if not isinstance(items, list | tuple):
        return None
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(items)
    if len(items) != len(kinds) or not items:
        return None
    found = tuple(_convert_single(item, kind) for item, kind in zip(items, kinds, strict=True))
    return None if None in found else found


def _parse_text(value: str) -> str | None:
    return str(value) or None


def _parse_int(value: str) -> int | None:
    return int(value) if INTEGER_PATTERN.fullmatch(value) else None


def _parse_float(value: str) -> float | None:
    return _to_finite_float(float(value)) if NUMBER_PATTERN.fullmatch(value) else None


def _guess_value(value: str) -> Any:
    """Read a value whose type nobody declared."""
    readers = (BOOL_WORDS.get, _parse_int, _parse_float, _parse_text)
    return next((found for read in readers if (found := read(value)) is not None), None)


TEXT_PARSERS: dict[Any, Callable[[str], Any]] = {
    str: _parse_text,
    int: _parse_int,
    float: _parse_float,
    bool: BOOL_WORDS.get,
}


def _describe_single(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        args = get_args(kind)
        count = "" if args[-1] is Ellipsis else f"{len(args)} of "
        return f"a list ({count}{_label_single(args[0])}), as [a,b] or a,b"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(kind, "a value")


def _label_single(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " | ".join(str(one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return f"[{_label_single(get_args(kind)[0])}, ...]"
    return "any" if kind is Any else str(getattr(kind, "__name__", kind))


def _spelling_hint(value: object, kinds: list[Any]) -> str:
    """Return the nearest spelling that would have been right, if one is plain."""
    choices = [str(one) for kind in kinds if get_origin(kind) is Literal for one in get_args(kind)]
    if choices and isinstance(value, str):
        found = suggest_name(value, choices)
        return f".{found}" if found else ""
    if not isinstance(value, str | float) or int not in kinds:
        return ""
    number = _parse_float(str(value)) if NUMBER_PATTERN.fullmatch(str(value)) else None
    return f"; write {int(number)}" if number is not None and number == int(number) else ""
