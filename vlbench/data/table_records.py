"""Records in a table of text: CSV or TSV, whose first line names the columns. Imports no torch."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlbench.data.record_dialects import is_record
from vlbench.data.record_files import AnyOrder, read_range
from vlbench.data.record_offsets import find_offsets
from vlbench.data.table_rows import OpenCell, split_row
from vlbench.errors import UserError
from vlbench.regular_files import MAX_DATA_BYTES, open_regular

MAX_LINE_BYTES = 1 << 26  # 67 MB: an image in base64 may be a cell
MAX_HEADER_BYTES = 1 << 16
MAX_ROW_LINES = 10_000  # behind a quote that is never closed, more are not searched
DELIMITERS = ("\t", ",", ";", "|")
INDEX_NAME = "index"  # of the first column where it has no name, as pandas writes its index


class TableRecords(AnyOrder):
    """The rows of a table as mappings of its columns; an empty cell is null."""

    def __init__(self, file: Path) -> None:
        """Find the rows; raises OSError, and a UserError with the line that is wrong."""
        self.name, self.folder = str(file), file.parent
        with open_regular(file, MAX_DATA_BYTES) as opened:
            first_line = opened.readline(MAX_HEADER_BYTES).decode("utf-8-sig", "replace")
        self.delimiter = _find_delimiter(first_line)
        self.columns = _column_names(first_line, self.delimiter)
        named = ", ".join(self.columns)
        if not is_record(dict.fromkeys(self.columns, "x")):
            raise UserError(
                f"is a table (CSV or TSV) with the columns {named}; expected image and caption, or "
                "image, question and answer, named in its first line"
            )
        twice = next((name for name in self.columns if self.columns.count(name) > 1), "")
        if twice:
            raise UserError(f"is a table whose columns are {named}; {twice!r} is there twice")
        self.offsets = find_offsets(file, f"rows {self.delimiter!r}", self._scan)
        self.stamps = [self.offsets.stamp]

    def __len__(self) -> int:
        return len(self.offsets)

    def read_record(self, index: int, with_images: bool = True) -> Any:
        """Return row `index` (from 0); a UserError if it has other columns than the first line."""
        data = read_range(self.name, self.offsets.stamp, *self.offsets.record_range(index))
        cells = split_row(data.decode("utf-8"), self.delimiter)
        if len(cells) != len(self.columns):
            raise UserError(f"has {len(cells)} cells; the table has {len(self.columns)} columns")
        return {name: cell or None for name, cell in zip(self.columns, cells, strict=True)}

    def _scan(self, file: Path) -> NDArray[np.int64]:
        """Return where each row begins; a row may go over several lines in quotes."""
        offsets = array("q")
        with open_regular(file, MAX_DATA_BYTES) as opened:
            opened.readline()
            lines = CountedLines(opened)
            start = lines.position
            for line in lines:
                if line.strip():
                    offsets.append(start)
                if '"' in line:
                    _skip_row(line, lines, self.delimiter)
                start = lines.position
            offsets.append(start)
        if len(offsets) == 1:
            raise UserError("the table holds no rows")
        return np.frombuffer(offsets, np.int64)


_CLOSING_QUOTE = re.compile(r'(?<!")(?:"")*"(?!")')
"""A run of an odd number of quotes: no other ends a cell."""


def _skip_row(first_line: str, lines: CountedLines, delimiter: str) -> None:
    """Take the further lines of a row that has quotes, in which a row may go over several.

    Of a row that is wrong only the first line is taken: it is a bad sample; the others are rows.
    """
    behind_first, text = lines.place, first_line
    while True:
        try:
            split_row(text, delimiter)
            return
        except OpenCell:
            more = _lines_to_quote(lines, MAX_ROW_LINES - (lines.place[1] - behind_first[1]))
        except UserError:
            more = ""
        if not more:
            lines.return_to(behind_first)
            return
        text += more


def _lines_to_quote(lines: CountedLines, most: int) -> str:
    """Return the next lines to one that may close a cell, "" where none of the next `most` may."""
    taken = []
    for _, line in zip(range(most), lines, strict=False):
        taken.append(line)
        if _CLOSING_QUOTE.search(line):
            return "".join(taken)
    return ""


def is_table(beginning: bytes) -> bool:
    """Tell whether a text begins as a table: with several names in its first line."""
    first_line = beginning.split(b"\n", 1)[0].decode("utf-8-sig", "replace")
    names = _column_names(first_line, _find_delimiter(first_line)) if first_line.strip() else []
    return len(names) > 1 and all(name.isprintable() for name in names)


def _find_delimiter(first_line: str) -> str:
    """Return the delimiter by which the first line names what a record has, or most columns."""
    for delimiter in DELIMITERS:
        if is_record(dict.fromkeys(_column_names(first_line, delimiter), "x")):
            return delimiter
    return max(DELIMITERS, key=first_line.count)


def _column_names(first_line: str, delimiter: str) -> list[str]:
    """Return the names of the columns; those without one are called by their number."""
    try:
        names = [name.strip() for name in split_row(first_line, delimiter)]
    except UserError:
        names = [name.strip() for name in first_line.split(delimiter)]
    unnamed = (INDEX_NAME, *(f"column {number}" for number in range(2, len(names) + 1)))
    return [name or other for name, other in zip(names, unnamed, strict=True)]


class CountedLines:
    """The lines of a file in UTF-8, with the position behind the last one that was taken."""

    def __init__(self, opened: BufferedReader) -> None:
        self._opened = opened
        self.position, self.count = opened.tell(), 1

    @property
    def place(self) -> tuple[int, int]:
        """The position and the number of lines, to which `return_to` goes back."""
        return self.position, self.count

    def return_to(self, place: tuple[int, int]) -> None:
        """Go back to where the lines were."""
        self.position, self.count = place
        self._opened.seek(self.position)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._opened.readline(MAX_LINE_BYTES)
        if not line:
            raise StopIteration
        self.count += 1
        self.position += len(line)
        zero = line.find(b"\0")
        if zero >= 0:
            raise UserError(f"is no text: its byte {self.position - len(line) + zero + 1} is 0")
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            where = f"line {self.count}, byte {error.start + 1}"
            raise UserError(f"{where}: not UTF-8; save the file as UTF-8") from None
