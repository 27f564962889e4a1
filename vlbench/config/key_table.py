"""The keys of recipes as a table, for help and for messages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, get_args, get_origin

from pydantic import BaseModel

from vlbench.config.key_types import PartName
from vlbench.config.schema import Recipe
from vlbench.key_errors import declared_keys
from vlbench.strict_values import is_section, kind_label, split_union, yaml_text


class KeyRow(NamedTuple):
    """One line of the table of keys."""

    name: str
    type: str
    default: str
    help: str


def key_rows(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[KeyRow]:
    """Yield the table of all keys in their order, connector options left out."""
    for name, field in declared_keys(section).items():
        kind, path, meaning = split_union(field.annotation)[0], prefix + name, field.description
        if path == "connector":
            yield KeyRow("connector.name", "str", "", "name of a connector (see list)")
            yield KeyRow("connector.OPTION", "", "", "option of that connector (see list)")
        elif prefix and name == "data":
            yield KeyRow(f"{path}.KEY", "", "null", str(meaning))
        elif is_section(kind):
            yield from key_rows(kind, f"{path}.")
        elif get_origin(kind) is dict:
            holder = "PART" if get_args(kind)[0] is PartName else "NAME"
            yield from key_rows(get_args(kind)[1], f"{path}.{holder}.")
        else:
            default = "(needed)" if field.is_required() else yaml_text(field.default)
            yield KeyRow(path, kind_label(field.annotation), default, str(meaning))
