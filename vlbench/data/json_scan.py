"""The records of a JSON file, found one by one in bounded memory: a list, or one after another.

The text is decoded as Latin-1, in which a character is a byte: JSON's own characters are ASCII, so
records begin and end where they do in UTF-8, which is checked beside it.
"""

from __future__ import annotations

import codecs
import json
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlbench.data.record_dialects import is_record
from vlbench.errors import UserError, describe_json_type
from vlbench.regular_files import CHUNK_BYTES, MAX_DATA_BYTES, format_bytes, open_regular

MAX_RECORD_BYTES = 1 << 28  # 268 MB of JSON, as with images in it as text
_CUT_MARGIN = 16  # a value that a chunk cuts fails this near its end: \\ud83d, -Infinity
_BLANKS = " \t\r\n"
_BOM = codecs.BOM_UTF8.decode("latin-1")


def scan_json(file: Path) -> NDArray[np.int64]:
    """Return where each record begins, and behind them where the last one has ended.

    Raises OSError, a UserError with line and column of what is no JSON, and one where there are no
    records.
    """
    scan = JsonScan(file)
    offsets = array("q", scan.iterate_starts())
    if not offsets:
        raise UserError("the list holds no records")
    offsets.append(scan.last_end)
    return np.frombuffer(offsets, np.int64)


class JsonScan:
    """A window of a file's text that moves forward as records are found."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.window, self.position = "", 0
        self.window_start = 0
        """Where the window begins in the file."""
        self.last_end = 0
        """Where the last record has ended."""
        self._at_end = False
        self._decoder = json.JSONDecoder()
        self._utf8 = codecs.getincrementaldecoder("utf-8")()

    def iterate_starts(self) -> Iterator[int]:
        """Yield the first byte of each record."""
        with self.open_window() as first:
            if first == "[":
                yield from (start for start, _ in self.iterate_list())
                if self.next_character():
                    raise self.syntax_error("extra data")
            else:
                yield from self._iterate_values()

    @contextmanager
    def open_window(self) -> Iterator[str]:
        """Open the file, and yield its first character that is not blank."""
        with open_regular(self.file, MAX_DATA_BYTES) as self._stream:
            while len(self.window) < len(_BOM) and self._read_more():
                pass
            self.position = len(_BOM) if self.window.startswith(_BOM) else 0
            first = self.next_character()
            if not first:
                raise UserError("the file is empty; expected a JSON list of records")
            yield first

    def iterate_list(self) -> Iterator[tuple[int, Any]]:
        """Yield first byte and value of each entry of the list at the position, and go behind it.

        `last_end` is where the entry ends.
        """
        self.position += 1
        if self.next_character() != "]":
            yield self.parse_value()
            while self.take_separator("]"):
                yield self.parse_value()
        self.position += 1

    def take_separator(self, closing: str) -> bool:
        """Go behind a comma to what follows; False at `closing`, where the position stays."""
        separator = self.next_character()
        if separator == closing:
            return False
        self.take_character(",")
        return True

    def take_character(self, character: str) -> None:
        """Go behind a comma or colon to the next character that is not blank."""
        if self.next_character() != character:
            raise self.syntax_error(f"expecting '{character}' delimiter")
        self.position += 1
        self.next_character()

    def _iterate_values(self) -> Iterator[int]:
        """Yield the records of JSON lines, which may take several lines each."""
        start, value = self.parse_value()
        is_single = not self.next_character()
        if not isinstance(value, dict) or (is_single and not is_record(value)):
            raise UserError(
                f"line {self._line_and_column(start)[0]} holds {describe_json_type(value)}; "
                f"expected a list of records{suggest_record_list(value)}"
            )
        yield start
        while self.next_character():
            yield self.parse_value()[0]

    def next_character(self) -> str:
        """Return the next character that is not blank, "" at the end of the file."""
        while True:
            rest = self.window[self.position : self.position + 1]
            if rest and rest not in _BLANKS:
                return rest
            if not rest and not self._read_more():
                return ""
            blank_end = self.position
            while blank_end < len(self.window) and self.window[blank_end] in _BLANKS:
                blank_end += 1
            self.position = blank_end

    def parse_value(self) -> tuple[int, Any]:
        """Parse the value at the position; return its first byte, and the value."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self.window, self.position)
                if end < len(self.window) - _CUT_MARGIN or not self._read_more():
                    break
            except json.JSONDecodeError as error:
                if not self._may_be_cut(error) or not self._read_more():
                    reason = error.msg[:1].lower() + error.msg[1:]
                    self.position = error.pos
                    raise self.syntax_error(reason) from None
            except ValueError as error:  # a number of more digits than Python converts
                raise UserError(f"cannot be read as JSON ({error})") from None
            except RecursionError:
                raise UserError("lists are nested too deeply; expected records") from None
            if len(self.window) - self.position > MAX_RECORD_BYTES:
                line = self._line_and_column(self.position)[0]
                limit = format_bytes(MAX_RECORD_BYTES)
                raise UserError(f"line {line} begins a record of more than {limit}")
        start = self.window_start + self.position
        self.position = end
        self.last_end = self.window_start + end
        return start, value

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """Tell whether a value may only go on behind the window."""
        is_text = error.msg.startswith("Unterminated string")
        return is_text or error.pos >= len(self.window) - _CUT_MARGIN

    def _read_more(self) -> bool:
        """Move the window to the position, and read the next chunk; False at the end."""
        if self._at_end:
            return False
        kept_size = len(self.window) - self.position
        # as much again as is kept: a long record is not parsed anew for each chunk
        chunk = self._stream.read(max(CHUNK_BYTES, kept_size))
        self._check_text(chunk)
        self._at_end = not chunk
        if chunk:
            self.window_start += self.position
            self.window = self.window[self.position :] + chunk.decode("latin-1")
            self.position = 0
        return bool(chunk)

    def _check_text(self, chunk: bytes) -> None:
        """Raise a UserError for what is not UTF-8, and for a byte 0, which no text has."""
        chunk_start = self._stream.tell() - len(chunk)
        zero = chunk.find(b"\0")
        if zero >= 0:
            raise UserError(f"is no text: its byte {chunk_start + zero + 1} is 0")
        pending = len(self._utf8.getstate()[0])
        try:
            self._utf8.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            line, column = self._locate(chunk_start - pending + error.start)
            raise UserError(
                f"line {line}, byte {column}: not UTF-8; save the file as UTF-8"
            ) from None

    def syntax_error(self, reason: str) -> UserError:
        """Return the error for what stands at the position."""
        line, column = self._line_and_column(self.position)
        return UserError(f"line {line}, column {column}: {reason}")

    def _line_and_column(self, position: int) -> tuple[int, int]:
        return self._locate(self.window_start + position, in_characters=True)

    def _locate(self, offset: int, in_characters: bool = False) -> tuple[int, int]:
        """Return line and byte (or character) of the file's byte `offset`, all from 1."""
        line, line_start = 1, 0
        with open_regular(self.file, MAX_DATA_BYTES) as opened:
            read = 0
            while read < offset and (chunk := opened.read(min(CHUNK_BYTES, offset - read))):
                line += chunk.count(b"\n")
                if b"\n" in chunk:
                    line_start = read + chunk.rindex(b"\n") + 1
                read += len(chunk)
            if not in_characters:
                return line, offset - line_start + 1
            opened.seek(line_start)
            before = opened.read(min(offset - line_start, MAX_RECORD_BYTES))
        return line, len(before.decode("utf-8-sig" if line == 1 else "utf-8", "replace")) + 1


def suggest_record_list(value: Any) -> str:
    """Suggest where the list of records may be in a mapping, or return an empty text."""
    if not isinstance(value, dict):
        return ""
    list_keys = [key for key, entry in value.items() if isinstance(entry, list) and entry]
    record_keys = [key for key in list_keys if isinstance(value[key][0], dict)]
    if not record_keys:
        return ""
    longest = max(record_keys, key=lambda key: len(value[key]))
    return f"; {longest!r} holds a list of {len(value[longest])} mappings: save that list alone"
