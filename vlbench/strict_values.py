"""Values of the command line and of YAML, read as declared types and checked by pydantic.

`key=value` gives text, which is read as the type that the key declares: `run=007` stays text and
`seed=7` is a number. YAML gives values, which are taken strictly: '1e-3' in quotes is no number,
true is no 1. What pydantic finds wrong becomes one sentence an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from itertools import chain, repeat
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from vlbench.errors import UserError, suggest_name

INTEGER_PATTERN = re.compile(r"[+-]?\d+")
NUMBER_PATTERN = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
MAX_DIGITS = 100  # of a typed whole number; Python itself refuses more than 4,300
MAX_BRACKETS = 1000  # of a typed list or mapping; PyYAML takes seconds for 5,000
NULL_WORDS = ("null", "none")
# Built at the first value: `--help` reads names, types and texts of fields alone.
STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)
PYTHON_WORDS = {"True": "true", "False": "false"}
ALLOWED_WORDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "model_type": "a mapping as {{KEY: VALUE}}",
    "dict_type": "a mapping as {{KEY: VALUE}}",
    "tuple_type": "a list, as [a,b] or a,b",
    "list_type": "a list, as [a,b]",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "string_too_short": "a text of at least {min_length} characters",
    "string_too_long": "a text of at most {max_length} characters",
    "literal_error": "{choices}",
    "greater_than_equal": "at least {ge}",
    "greater_than": "above {gt}",
    "less_than_equal": "at most {le}",
}
"""What a value must be, by the type of pydantic's error."""


class RawText(str):
    """A value as it was typed on the command line, to be read as the type of its key."""


class FileRecord(BaseModel):
    """A mapping of a file that another version may have written: declared keys have their kinds."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)


def check_record(said: dict[str, Any], kind: type[FileRecord], file: Path) -> dict[str, Any]:
    """Return what a file says, unchanged; a UserError names the key that is not of its kind."""
    try:
        kind.model_validate(said)
    except ValidationError as error:
        details = error.errors()[0]
        place = ".".join(map(str, details["loc"]))
        raise UserError(f"{file}: {place} {describe_error(details)}".replace("  ", " ")) from error
    return said


def convert_value(value: object, kind: Any) -> Any:
    """Return `value` as a value of the type `kind`; a ValueError says what is allowed."""
    try:
        return _type_adapter(kind).validate_python(read_value(value, kind))
    except ValidationError as error:
        sentences = [describe_error(details) for details in error.errors()]
        raise ValueError(" or ".join(dict.fromkeys(sentences))) from None


@cache
def _type_adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=STRICT)


def read_value(value: Any, kind: Any) -> Any:
    """Return `value` ready for the strict check as `kind`: text read, lists as tuples.

    What cannot be read as `kind` is returned as it is, for the check to refuse.
    """
    if isinstance(value, str) and "${" in value:
        raise ValueError(f"holds '${{' in '{value}'; values are taken as written, not interpolated")
    members = split_union(kind)
    if isinstance(value, RawText):
        value = _read_text(value, members)
    origin, args = get_origin(members[0]), get_args(members[0])
    if origin is tuple and isinstance(value, str) and str in split_union(args[0]):
        value = [value]  # one name where several may stand
    if origin is tuple and isinstance(value, list | tuple):
        kinds = chain(args if ... not in args else (), repeat(args[0]))
        return tuple(map(read_value, value, kinds))
    if origin is dict and isinstance(value, dict):
        return {name: read_value(item, args[1]) for name, item in value.items()}
    if origin is Literal and type(value) in (int, float):
        # a choice such as precision "32" may stand in YAML without quotes
        return next((choice for choice in args if str(choice) == str(value)), value)
    return value


def _read_text(text: RawText, members: list[Any]) -> Any:
    """Return typed text as one of the types `members`, or as text where it is none of them."""
    if is_null(text) and (NoneType in members or Any in members):
        return None
    if members[0] is str or text in get_args(members[0]):
        return str(text)
    if get_origin(members[0]) is tuple or text.startswith("{"):
        return parse_flow_yaml(text)
    if text in ("true", "false"):
        return text == "true"
    if INTEGER_PATTERN.fullmatch(text):
        if len(text) > MAX_DIGITS:
            raise ValueError(f"is a number of {len(text):,} digits; at most {MAX_DIGITS} are read")
        return int(text)
    if NUMBER_PATTERN.fullmatch(text):
        return float(text)
    return str(text) if str in members or Any in members else text


def parse_flow_yaml(text: str) -> Any:
    """Return `{a: 1, b: {c: 2}}`, `[a, b]` or `a,b` with every scalar left as `RawText`."""
    if not text.startswith(("{", "[")):
        return [RawText(part.strip()) for part in text.split(",")]
    brackets = text.count("[") + text.count("{")
    if brackets > MAX_BRACKETS:
        raise ValueError(f"has {brackets:,} brackets; at most {MAX_BRACKETS:,} are read")
    import yaml  # late, as --help needs none of it

    try:
        return _parse_node(yaml.compose(text, Loader=yaml.BaseLoader))
    except yaml.YAMLError as error:
        raise ValueError(f"cannot be read: '{text}' ({getattr(error, 'problem', error)})") from None
    except RecursionError:
        raise ValueError(f"is nested too deeply: '{text[:40]}...'") from None


def _parse_node(node: Any) -> Any:
    """Return the value of a node of YAML, as PyYAML composes it."""
    if node.id == "sequence":
        return [_parse_node(item) for item in node.value]
    if node.id != "mapping":
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


def is_null(value: object) -> bool:
    """Tell whether a value, also one that was typed, is null."""
    return value is None or (isinstance(value, RawText) and value in NULL_WORDS)


def split_union(kind: Any) -> list[Any]:
    """Return the types that a declared type allows, without limits, `None` (NoneType) last."""
    if get_origin(kind) is Annotated:
        return split_union(get_args(kind)[0])
    if get_origin(kind) not in (Union, UnionType):
        return [kind]
    members = [member for arg in get_args(kind) for member in split_union(arg)]
    return sorted(members, key=lambda member: member is NoneType)


def is_section(kind: Any) -> TypeGuard[type[BaseModel]]:
    """Tell whether a declared type is a mapping with keys of its own."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def kind_label(kind: Any) -> str:
    """Return a type in a word or two, for tables."""
    return " | ".join(_member_label(member) for member in split_union(kind))


def _member_label(member: Any) -> str:
    if get_origin(member) is Literal:
        return " | ".join(yaml_text(choice) for choice in get_args(member))
    if get_origin(member) is tuple:
        return f"[{kind_label(get_args(member)[0])}, ...]"
    if is_section(member):
        return f"{{{', '.join(member.model_fields)}}}"
    return {NoneType: "null", Any: "any"}.get(member) or str(member.__name__)


def yaml_text(value: object) -> str:
    """Return a value as it is written in YAML and on the command line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(yaml_text, value))}]"
    if isinstance(value, dict):
        pairs = (f"{key}: {_nested_text(one)}" for key, one in value.items())
        return f"{{{', '.join(pairs)}}}"
    return str(value)


def _nested_text(value: object) -> str:
    """Return a value inside of a mapping: a text in quotes, as it may have commas."""
    is_text = isinstance(value, str)
    return json.dumps(value, ensure_ascii=False) if is_text else yaml_text(value)


def format_value(value: object) -> str:
    """Return a value as it stands in a message."""
    if isinstance(value, dict):
        return "a mapping"
    return f"'{value}'" if isinstance(value, str) else yaml_text(value)


def join_path(path: Sequence[int | str]) -> str:
    """Return a path into nested values as `data.mix[0].weight`."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).removeprefix(".")


def describe_error(details: ErrorDetails) -> str:
    """Return the sentence for one of pydantic's errors, to stand behind the name of the key."""
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        return "is no key here"
    expected = re.split(", | or ", str(context.get("expected", "")))
    choices = [PYTHON_WORDS.get(word, word.strip("'")) for word in expected]
    limits = {name: f"{x:g}" if isinstance(x, float) else x for name, x in context.items()}
    limits["choices"] = f"{'one of ' if len(choices) > 1 else ''}{', '.join(choices)}"
    hint = suggest_name(str(value), choices)
    hint = f".{hint}" if hint else ""
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        hint = f"; write {int(value)}"
    message = details["msg"].removeprefix("Input should be ")
    allowed = ALLOWED_WORDS[kind].format_map(limits) if kind in ALLOWED_WORDS else message
    return f"must be {allowed}, given {format_value(value)}{hint}"
