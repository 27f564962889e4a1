"""A strict walk over one layer of a recipe: every key, type and range, all mistakes collected."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Mapping
from typing import Any, get_args, get_origin

from vlbench.mistakes import nearest
from vlbench.schema import Recipe, keys, rows
from vlbench.values import NULL, Text, convert, flow, show, unwrap

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


class Walk:
    """The walk over one layer; `mistakes` grows, what is right is returned with typed values."""

    def __init__(self, where: str = "", stages: Collection[str] | None = None) -> None:
        """Name the layer by `where`; `stages` are the only stage names, None allows any."""
        self.where = f"{where}: " if where else ""
        self.stages = stages
        self.mistakes: list[str] = []

    def recipe(self, tree: object) -> dict[str, Any]:
        """Return the layer `tree` with its values converted to what `Recipe` declares."""
        return self._mapping(tree, Recipe, "")

    def _say(self, text: str) -> None:
        self.mistakes.append(self.where + text)

    def _opened(self, value: object, path: str) -> dict[str, Any]:
        """Return a mapping, also one typed as `{a: 1}` on the command line; {} after a mistake."""
        given = value
        if isinstance(value, Text):
            try:
                value = flow(value) if value.startswith("{") else value
            except ValueError as error:
                self._say(f"{path} {error}")
                return {}
        if isinstance(value, Mapping):
            return {str(key): item for key, item in value.items()}
        what = path or "a recipe"
        start = f"{path}." if path else ""
        self._say(
            f"{what} is a mapping, given {show(given)}; write {start}KEY=VALUE or {{KEY: VALUE}}"
        )
        return {}

    def _mapping(self, value: object, cls: type, path: str) -> dict[str, Any]:
        declared = keys(cls)
        result: dict[str, Any] = {}
        for name, item in self._opened(value, path).items():
            full = f"{path}.{name}" if path else name
            if name not in declared:
                self._unknown(full, name, declared)
                continue
            kind, field = declared[name]
            before = len(self.mistakes)
            converted = self._value(item, kind, full, field.metadata)
            if len(self.mistakes) == before or isinstance(converted, dict):
                result[name] = converted
        return result

    def _value(self, value: object, kind: Any, path: str, limits: Mapping[str, Any]) -> Any:
        inner, optional = unwrap(kind)
        if optional and (value is None or (isinstance(value, Text) and value in NULL)):
            return None
        if dataclasses.is_dataclass(inner[0]):
            return self._mapping(value, inner[0], path)  # type: ignore[arg-type]
        if get_origin(inner[0]) is dict:
            key, item = get_args(inner[0])
            return self._named(value, key, item, path)
        if get_origin(inner[0]) is tuple and dataclasses.is_dataclass(get_args(inner[0])[0]):
            return self._items(value, get_args(inner[0])[0], path)
        try:
            converted = convert(value, kind)
        except ValueError as error:
            self._say(f"{path} {error}")
            return None
        self._range(converted, path, limits)
        return os.path.expanduser(converted) if limits.get("path") else converted

    def _named(self, value: object, key: Any, kind: Any, path: str) -> dict[str, Any]:
        """Walk a mapping with names of its own: stages, parts of a stage, a connector's options."""
        opened = self._opened(value, path)
        if kind is Any:  # the options are checked when the connector is known
            return self._connector(opened)
        allowed = self.stages if key is str else get_args(key)
        result: dict[str, Any] = {}
        for name, item in opened.items():
            if allowed is not None and name not in allowed:
                known = ", ".join(allowed)
                self._say(f"{path} has no '{name}'; there is: {known}.{nearest(name, allowed)}")
            elif not NAME.fullmatch(name):
                self._say(f"{path} has a name '{name}'; use letters, digits and _")
            else:
                result[name] = self._value(item, kind, f"{path}.{name}", {})
        return result

    def _connector(self, options: dict[str, Any]) -> dict[str, Any]:
        if "name" in options:
            name = self._value(options["name"], str, "connector.name", {})
            options["name"] = name
            if name is None:
                del options["name"]
        return options

    def _items(self, value: object, cls: type, path: str) -> tuple[dict[str, Any], ...]:
        try:
            items = flow(value) if isinstance(value, Text) else value
        except ValueError as error:
            self._say(f"{path} {error}")
            return ()
        if not isinstance(items, list) or not items:
            self._say(f"{path} must be a list of mappings, given {show(value)}")
            return ()
        return tuple(self._mapping(item, cls, f"{path}[{i}]") for i, item in enumerate(items))

    def _range(self, value: object, path: str, limits: Mapping[str, Any]) -> None:
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, bool) or not isinstance(one, int | float):
                continue
            low, above, high = (limits.get(name) for name in ("low", "above", "high"))
            words = [f"at least {low}"] * (low is not None) + [f"above {above}"] * (
                above is not None
            )
            words += [f"at most {high}"] * (high is not None)
            outside = (low is not None and one < low) or (above is not None and one <= above)
            if outside or (high is not None and one > high):
                self._say(f"{path} must be {' and '.join(words)}, given {one}")

    def _unknown(self, path: str, name: str, declared: Mapping[str, Any]) -> None:
        elsewhere = [row.name for row in rows() if row.name.endswith(f".{name}")]
        close = f" Did you mean '{elsewhere[0]}'?" if elsewhere else nearest(name, declared)
        parent = path.rpartition(".")[0]
        inside = f"{parent} takes" if parent else "keys are"
        self._say(f"unknown key '{path}'; {inside}: {', '.join(declared)}.{close}")
