"""A strict walk over one layer of a recipe: every key, type and range, all mistakes collected."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Mapping
from typing import Any, get_args, get_origin

from vlbench.config.convert import (
    NULL_WORDS,
    RawText,
    convert_value,
    format_value,
    parse_flow_yaml,
    split_union,
)
from vlbench.config.schema import Recipe, declared_keys, key_rows
from vlbench.errors import suggest_name

NAME_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


class LayerValidator:
    """The walk over one layer; `mistakes` grows, what is right is returned with typed values."""

    def __init__(self, layer_name: str = "", stage_names: Collection[str] | None = None) -> None:
        """Name the layer by `where`; `stages` are the only stage names, None allows any."""
        self.layer_prefix = f"{layer_name}: " if layer_name else ""
        self.stage_names = stage_names
        self.errors: list[str] = []

    def validate_recipe(self, tree: object) -> dict[str, Any]:
        """Return the layer `tree` with its values converted to what `Recipe` declares."""
        return self._validate_mapping(tree, Recipe, "")

    def _add_error(self, message: str) -> None:
        self.errors.append(self.layer_prefix + message)

    def _open_mapping(self, value: object, path: str) -> dict[str, Any]:
        """Return a mapping, also one typed as `{a: 1}` on the command line; {} after a mistake."""
        given = value
        if isinstance(value, RawText):
            try:
                value = parse_flow_yaml(value) if value.startswith("{") else value
            except ValueError as error:
                self._add_error(f"{path} {error}")
                return {}
        if isinstance(value, Mapping):
            return {str(key): item for key, item in value.items()}
        what = path or "a recipe"
        start = f"{path}." if path else ""
        self._add_error(
            f"{what} is a mapping, given {format_value(given)}; write {start}KEY=VALUE or "
            f"{{KEY: VALUE}}"
        )
        return {}

    def _validate_mapping(self, value: object, cls: type, path: str) -> dict[str, Any]:
        declared = declared_keys(cls)
        result: dict[str, Any] = {}
        for name, item in self._open_mapping(value, path).items():
            full = f"{path}.{name}" if path else name
            if name not in declared:
                self._add_unknown_key(full, name, declared)
                continue
            kind, field = declared[name]
            before = len(self.errors)
            converted = self._validate_value(item, kind, full, field.metadata)
            if len(self.errors) == before or isinstance(converted, dict):
                result[name] = converted
        return result

    def _validate_value(
        self, value: object, kind: Any, path: str, limits: Mapping[str, Any]
    ) -> Any:
        inner, optional = split_union(kind)
        if optional and (value is None or (isinstance(value, RawText) and value in NULL_WORDS)):
            return None
        if dataclasses.is_dataclass(inner[0]):
            return self._validate_mapping(value, inner[0], path)  # type: ignore[arg-type]
        if get_origin(inner[0]) is dict:
            key, item = get_args(inner[0])
            return self._validate_named_items(value, key, item, path)
        if get_origin(inner[0]) is tuple and dataclasses.is_dataclass(get_args(inner[0])[0]):
            return self._validate_list(value, get_args(inner[0])[0], path)
        try:
            converted = convert_value(value, kind)
        except ValueError as error:
            self._add_error(f"{path} {error}")
            return None
        self._check_range(converted, path, limits)
        return os.path.expanduser(converted) if limits.get("path") else converted

    def _validate_named_items(
        self, value: object, key: Any, kind: Any, path: str
    ) -> dict[str, Any]:
        """Walk a mapping with names of its own: stages, parts of a stage, a connector's options."""
        opened = self._open_mapping(value, path)
        if kind is Any:  # the options are checked when the connector is known
            return self._validate_connector(opened)
        allowed = self.stage_names if key is str else get_args(key)
        result: dict[str, Any] = {}
        for name, item in opened.items():
            if allowed is not None and name not in allowed:
                known = ", ".join(allowed)
                self._add_error(
                    f"{path} has no '{name}'; there is: {known}.{suggest_name(name, allowed)}"
                )
            elif not NAME_PATTERN.fullmatch(name):
                self._add_error(f"{path} has a name '{name}'; use letters, digits and _")
            else:
                result[name] = self._validate_value(item, kind, f"{path}.{name}", {})
        return result

    def _validate_connector(self, options: dict[str, Any]) -> dict[str, Any]:
        if "name" in options:
            name = self._validate_value(options["name"], str, "connector.name", {})
            options["name"] = name
            if name is None:
                del options["name"]
        return options

    def _validate_list(self, value: object, cls: type, path: str) -> tuple[dict[str, Any], ...]:
        try:
            items = parse_flow_yaml(value) if isinstance(value, RawText) else value
        except ValueError as error:
            self._add_error(f"{path} {error}")
            return ()
        if not isinstance(items, list) or not items:
            self._add_error(f"{path} must be a list of mappings, given {format_value(value)}")
            return ()
        return tuple(
            self._validate_mapping(item, cls, f"{path}[{i}]") for i, item in enumerate(items)
        )

    def _check_range(self, value: object, path: str, limits: Mapping[str, Any]) -> None:
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
                self._add_error(f"{path} must be {' and '.join(words)}, given {one}")

    def _add_unknown_key(self, path: str, name: str, declared: Mapping[str, Any]) -> None:
        elsewhere = [row.name for row in key_rows() if row.name.endswith(f".{name}")]
        close = f" Did you mean '{elsewhere[0]}'?" if elsewhere else suggest_name(name, declared)
        parent = path.rpartition(".")[0]
        inside = f"{parent} takes" if parent else "keys are"
        self._add_error(f"unknown key '{path}'; {inside}: {', '.join(declared)}.{close}")
