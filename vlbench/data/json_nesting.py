"""Records that stand deeper in a JSON file: a list under a key, or the values of a mapping.

Annotation files are one mapping, as `{"info": {...}, "images": [...], "annotations": [...]}`. What
stands before the records is read entry by entry and forgotten, what stands behind them is not read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vlbench.data.json_scan import JsonScan
from vlbench.errors import UserError, suggest_name

EVERY_VALUE = "*"
"""At the end of a path: the records are the values of a mapping."""


class FoundRecord(NamedTuple):
    """A record, and the bytes of the file that hold it, with its key where it has one."""

    start: int
    end: int
    value: Any
    key: str | None = None
    """Of a value of a mapping; the record's bytes begin with it."""


def scan_nested(file: Path, path: str) -> Iterator[FoundRecord]:
    """Yield the records at `path`: keys with dots between them, "" for the file itself.

    Raises OSError, a UserError with line and column of what is no JSON, and one for a key that is
    not there or that holds no list.
    """
    keys = path.split(".") if path else []
    is_mapping = keys[-1:] == [EVERY_VALUE]
    scan = _NestedScan(file)
    with scan.open_window() as first:
        if not keys and first != "[":
            if first != "{":
                raise UserError("is no JSON; `lines` in the mapping says how a line is read")
            yield from scan.iterate_lines()
            return
        for number, key in enumerate(keys[:-1] if is_mapping else keys):
            scan.find_key(key, ".".join(keys[: number + 1]))
        yield from scan.iterate_mapping(path) if is_mapping else scan.iterate_entries(path)


class _NestedScan(JsonScan):
    """A window of a file's text, with the values that stand in a mapping."""

    def iterate_lines(self) -> Iterator[FoundRecord]:
        while self.next_character():
            start, value = self.parse_value()
            yield FoundRecord(start, self.last_end, self._decode(start, value))

    def iterate_entries(self, path: str) -> Iterator[FoundRecord]:
        self._expect("[", path, "a list of records")
        for start, value in self.iterate_list():
            yield FoundRecord(start, self.last_end, self._decode(start, value))

    def iterate_mapping(self, path: str) -> Iterator[FoundRecord]:
        self._expect("{", path, "a mapping of records by their keys")
        for start, key in self._iterate_keys():
            value_start, value = self.parse_value()
            yield FoundRecord(start, self.last_end, self._decode(value_start, value), key)

    def find_key(self, wanted: str, path: str) -> None:
        """Go to the value of a key of the mapping at the position."""
        self._expect("{", path.rpartition(".")[0], f"a mapping with the key {wanted!r}")
        passed = []
        for _, key in self._iterate_keys():
            if key == wanted:
                return
            passed.append(key)
            self._skip_value()
        keys = ", ".join(map(repr, passed[:10])) or "none"
        raise UserError(f"has no {path!r}; its keys are {keys}.{suggest_name(wanted, passed)}")

    def _iterate_keys(self) -> Iterator[tuple[int, str]]:
        """Yield first byte and text of each key; the caller goes behind its value."""
        self.position += 1
        is_open = self.next_character() != "}"
        while is_open:
            start, key = self._parse_key()
            yield start, key
            is_open = self.take_separator("}")

    def _parse_key(self) -> tuple[int, str]:
        if self.next_character() != '"':
            raise self.syntax_error("expecting property name enclosed in double quotes")
        start, key = self.parse_value()
        key = str(self._decode(start, key))
        self.take_character(":")
        return start, key

    def _skip_value(self) -> None:
        """Go behind a value; a list or a mapping is not held whole."""
        opening = self.next_character()
        if opening == "[":
            for _ in self.iterate_list():
                pass
        elif opening == "{":
            for _ in self._iterate_keys():
                self.parse_value()
            self.position += 1
        else:
            self.parse_value()

    def _decode(self, start: int, value: Any) -> Any:
        """Return the value that was parsed last as UTF-8: in the window a character is a byte."""
        text = self.window[start - self.window_start : self.position]
        return value if text.isascii() else json.loads(text.encode("latin-1").decode("utf-8"))

    def _expect(self, opening: str, path: str, what: str) -> None:
        found = self.next_character()
        if found != opening:
            place = f"{path!r}" if path.strip(EVERY_VALUE) else "the file"
            kinds = {"[": "a list", "{": "a mapping"}
            hint = f"; for its values write {path}.{EVERY_VALUE}" if found == "{" and path else ""
            raise UserError(f"{place} holds {kinds.get(found, 'one value')}; expected {what}{hint}")
