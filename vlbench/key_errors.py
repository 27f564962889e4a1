"""What pydantic finds wrong with a mapping of declared keys, one line for each error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from vlbench.errors import UserError, suggest_name
from vlbench.strict_values import describe_error, is_section, join_path, split_union

SectionT = TypeVar("SectionT", bound=BaseModel)


def declared_keys(form: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the keys of a mapping as they are spelled in YAML."""
    return {field.alias or name: field for name, field in form.model_fields.items()}


def section_at(path: Sequence[int | str], form: type[BaseModel]) -> type[BaseModel]:
    """Return the model of the mapping at a path of keys and list indices in a `form`."""
    kind: Any = form
    for part in path:
        if is_section(kind):
            kind = declared_keys(kind)[str(part)].annotation
        else:  # the type of the items of a list or of a mapping with names of its own
            kind = get_args(kind)[get_origin(kind) is dict]
        kind = split_union(kind)[0]
    assert is_section(kind)
    return kind


def check_file_keys(
    form: type[SectionT], tree: dict[str, Any], file: Path, whole: str, takes: str = ""
) -> SectionT:
    """Return the keys of a file as `form` declares them; a UserError has a line for each error."""
    try:
        return form.model_validate(tree)
    except ValidationError as error:
        lines = [key_error_line(form, one, whole, takes) for one in primary_errors(error)]
        raise UserError(*dict.fromkeys(f"{file}: {line}" for line in lines)) from error


def primary_errors(error: ValidationError) -> Iterator[ErrorDetails]:
    """Yield pydantic's errors, without "too short" of a list whose items are told already."""
    paths = [details["loc"] for details in error.errors()]
    above = {path[:length] for path in paths for length in range(len(path))}
    for details in error.errors():
        if details["type"] != "too_short" or details["loc"] not in above:
            yield details


def key_error_line(
    form: type[BaseModel],
    details: ErrorDetails,
    whole: str,
    takes: str = "",
    all_keys: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Return one of pydantic's errors as a line: the key, what was given, and what is allowed.

    `whole` names the mapping that `form` declares. `takes` stands before the keys of a mapping that
    has an unknown one; by default that mapping's path and "takes". Of `all_keys`, the dotted paths
    of a form with mappings in it with their meanings, the nearest to an unknown key is suggested.
    """
    *parents, key = details["loc"] or ("",)
    name, parent = join_path(details["loc"]), join_path(parents)
    if details["type"] == "missing" and isinstance(key, int):
        return f"{parent} has only {key} of its values"
    if details["type"] == "missing":
        meaning = declared_keys(section_at(parents, form))[str(key)].description
        return f"{name} is missing: {meaning}"
    if details["type"] == "extra_forbidden":
        declared = declared_keys(section_at(parents, form))
        close = suggest_path(str(key), declared, all_keys)
        takes = takes or f"{parent or whole} takes"
        return f"unknown key '{name}'; {takes}: {', '.join(declared)}.{close}"
    if key == "[key]":
        name = f"a key of {join_path(parents[:-1])}"
    return f"{name or whole} {describe_error(details)}"


def suggest_path(key: str, declared: Iterable[str], all_keys: Mapping[str, str]) -> str:
    """Return " Did you mean 'x'?" for what an unknown key of a mapping was meant to be, else "".

    That is a key of its name elsewhere (`lr`), one of the mapping itself that is spelled alike, one
    elsewhere that is, or one whose meaning has its words (`learning_rate`).

    Args:
        key: The unknown key.
        declared: The keys of the mapping that it stands in.
        all_keys: The dotted paths of all keys, with their meanings.
    """
    by_ending: dict[str, str] = {}
    for path in all_keys:
        by_ending.setdefault(path.rpartition(".")[2], path)
    if key in by_ending:
        return f" Did you mean '{by_ending[key]}'?"
    if close := suggest_name(key, declared):
        return close
    words = key.replace("_", " ")
    found = [by_ending[name] for name in difflib.get_close_matches(key, by_ending, n=1)]
    found += [path for path, meaning in all_keys.items() if words in meaning]
    return f" Did you mean '{found[0]}'?" if found else ""
