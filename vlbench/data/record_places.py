"""Records of annotation files, found and read by their bytes: JSON below a path, or lines."""

from __future__ import annotations

import contextlib
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlbench.data.json_nesting import EVERY_VALUE, FoundRecord, scan_nested
from vlbench.data.mapping_texts import LinePattern
from vlbench.data.record_files import RECORD_DECODER, FileStamp, read_beginning, read_range
from vlbench.data.table_records import CountedLines
from vlbench.errors import BadSample, UserError, describe_json_type
from vlbench.regular_files import MAX_DATA_BYTES, open_regular

REMEDY = "remove the files *.index beside it, and they are made anew"


@dataclass(frozen=True)
class RecordPlace:
    """Records in a file: JSON below a path, or lines of a pattern."""

    file: Path
    stamp: FileStamp
    at: str = ""
    pattern: LinePattern | None = None

    def iterate_records(self) -> Iterator[FoundRecord]:
        """Yield the records with their bytes; raises OSError, and a UserError that names the file.

        A line that does not fit the pattern is there without a value.
        """
        try:
            if self.pattern is None:
                read_beginning(self.file)
                yield from scan_nested(self.file, self.at)
            else:
                yield from _scan_lines(self.file, self.pattern)
        except BadSample:
            raise
        except UserError as error:
            raise UserError(f"{self.file}: {error}") from None

    def read_record(self, start: int, end: int) -> dict[str, Any]:
        """Return the record in some bytes; BadSample for no mapping, UserError for a changed file.

        The key of a mapping's value is added as `key`.
        """
        if not 0 <= start < end <= self.stamp[0]:
            raise UserError(f"{self.file}: has no bytes {start} to {end}; {REMEDY}")
        data = read_range(str(self.file), self.stamp, start, end)
        try:
            text = data.decode("utf-8")
            if self.pattern is not None:
                return self.pattern.read_line(text.rstrip("\r\n"))
            key = None
            if self.at.endswith(EVERY_VALUE):
                key, position = RECORD_DECODER.raw_decode(text)
                text = text[text.index(":", position) + 1 :].lstrip()
            value = RECORD_DECODER.raw_decode(text)[0]
        except UserError:
            raise
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.file}: no record begins at byte {start}; {REMEDY}") from error
        return with_key(value, key)


def with_key(value: Any, key: str | None) -> dict[str, Any]:
    """Return a record with its key in a mapping as `key`; BadSample for what is no mapping."""
    if not isinstance(value, dict):
        raise BadSample("", f"is {describe_json_type(value)}; expected a mapping")
    return value if key is None else {**value, "key": key}


def _scan_lines(file: Path, pattern: LinePattern) -> Iterator[FoundRecord]:
    with open_regular(file, MAX_DATA_BYTES) as opened:
        if opened.read(len(BOM_UTF8)) != BOM_UTF8:
            opened.seek(0)
        lines = CountedLines(opened)
        start = lines.position
        for line in lines:
            if line.strip():
                value = None
                with contextlib.suppress(UserError):  # it is told when the line is read
                    value = pattern.read_line(line.rstrip("\r\n"))
                yield FoundRecord(start, lines.position, value)
            start = lines.position
