"""Errors for users, one line each: what is wrong, what was given, what is allowed."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

MAX_LINE_LENGTH = 300  # characters of a library's error that a message quotes
MAX_WORD_LENGTH = 300  # characters without a space in a message; paths are shorter
BIDI_CONTROLS = "\\u061c\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069"  # they reorder what is shown
CONTROL_CHARACTERS = re.compile(f"[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029{BIDI_CONTROLS}]")
LINE_CONTROLS = re.compile(f"[\\x00-\\x09\\x0b-\\x1f\\x7f-\\x9f\\u2028\\u2029{BIDI_CONTROLS}]")
LONG_WORD_PATTERN = re.compile(rf"\S{{{MAX_WORD_LENGTH + 1},}}")


class UserError(ValueError):
    """What the user can correct: one line of text for each mistake, no stack trace.

    Words longer than MAX_WORD_LENGTH are shortened: an image given as text would fill the screen.
    Control characters are escaped, so that no text that a message quotes begins a line of its own.
    """

    def __init__(self, *lines: object) -> None:
        """Take the lines, one text for each."""
        super().__init__(
            *(
                shorten_words(escape_to_one_line(line)) if isinstance(line, str) else line
                for line in lines
            )
        )

    @property
    def lines(self) -> list[str]:
        """The lines for the user."""
        return [str(line) for line in self.args]

    def __str__(self) -> str:
        """Return the lines as one text."""
        return "\n".join(self.lines)


class EnvironmentFailure(RuntimeError):
    """What failed on the machine and not in the command: one line, and exit code 1."""


class SampleOrigin(NamedTuple):
    """Where a sample comes from: the identity of its record."""

    source_name: str
    """Name of the source."""
    source_index: int
    """Of the source among those that a stage mixes, from 0."""
    record_number: int
    """Of the record in the source, from 1."""


class HasOrigin(Protocol):
    """Something whose origin may be known."""

    @property
    def origin(self) -> SampleOrigin | None: ...


class BadSample(UserError):
    """One sample that cannot be used: it is named, and left out or stops the run."""

    def __init__(self, sample_id: str, reason: str) -> None:
        """Take the sample's id, and what is wrong with it in one line."""
        super().__init__()
        self.args = (sample_id, reason)  # as given, so that it can be unpickled from a worker
        self.sample_id = shorten_words(sample_id)
        self.reason = shorten_words(escape_to_one_line(reason))
        self.source_name = ""
        self.record_number: int | None = None

    def with_origin(self, source_name: str, record_number: int | None) -> BadSample:
        """Return it with the name of its source, and the number of its record there (from 1)."""
        self.source_name, self.record_number = source_name, record_number
        return self

    def with_origin_of(self, sample: HasOrigin) -> BadSample:
        """Return it with the origin of `sample`, where that is known."""
        origin = sample.origin
        if origin is None:
            return self
        return self.with_origin(origin.source_name, origin.record_number)

    @property
    def record_identity(self) -> tuple[str, int | str]:
        """Source and number of the record; ids are labels, and several records may have the same.

        Where no record is known, the id stands for it.
        """
        return (
            self.source_name,
            self.sample_id if self.record_number is None else self.record_number,
        )

    @property
    def sample_label(self) -> str:
        """The id, and the number of the record where it is known and not the id."""
        record_name = f"record {self.record_number}"
        names_record = self.record_number is None or self.sample_id == record_name
        return escape_to_one_line(
            self.sample_id if names_record else f"{self.sample_id} (record {self.record_number})"
        )

    def __str__(self) -> str:
        """Return the line for the user."""
        return f"sample {self.sample_label}: {self.reason}"


def shorten_words(text: str) -> str:
    """Return a text whose longest words are cut in the middle, with their lengths.

    Half of a surrogate pair, which cannot be printed, is escaped.
    """
    return LONG_WORD_PATTERN.sub(
        lambda word: f"{word[0][:80]}... ({len(word[0]):,} characters)", escape_surrogates(text)
    )


def escape_surrogates(text: str) -> str:
    """Return a text with halves of surrogate pairs (file names that are not UTF-8) escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def escape_to_one_line(text: str) -> str:
    """Return a text that can be printed, with its line ends and control characters escaped."""
    return CONTROL_CHARACTERS.sub(lambda match: repr(match[0])[1:-1], escape_surrogates(text))


def printable_text(text: str) -> str:
    """Return a text that can be shown to people: control characters but line feeds escaped."""
    return LINE_CONTROLS.sub(lambda match: repr(match[0])[1:-1], text)


def escape_in_json(text: str) -> str:
    """Return a JSON text that means the same and can be shown: control characters are escaped.

    JSON's own escapes leave out DEL, the second row of control characters, and those that reorder
    what is shown. Halves of surrogate pairs are escaped too.
    """
    shown = LINE_CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    return escape_surrogates(shown)


def one_line(error: BaseException | str, max_lines: int | None = None) -> str:
    """Return the text of an error as one line of at most 300 characters.

    Args:
        error: The error, or its text.
        max_lines: How many of its lines that are not empty are taken; None takes all.

    Returns:
        The lines joined by spaces; of an error without a text, the name of its type.
    """
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    text = " ".join([line for line in lines if line][:max_lines])[:MAX_LINE_LENGTH]
    return text or ("" if isinstance(error, str) else type(error).__name__)


def describe_json_type(value: Any) -> str:
    """Name the JSON type of a value, with its beginning."""
    kinds = {dict: "a mapping", list: "a list", str: "a text", bool: "a truth value"}
    if value is None:
        return "null"
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return f"{kinds.get(type(value), 'a number')} ({text[:40]}{'...' if len(text) > 40 else ''})"


def suggest_name(name: str, known_names: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the name in `known_names` that is most like `name`, else "".

    That is the only one with `name` among its words (`batch` for `global_batch_size`), or else the
    one that is spelled most alike.
    """
    by_lower = {known.lower(): known for known in known_names}
    similar = [known for known in by_lower if name.lower() in known.split("_")]
    if len(similar) != 1:
        similar = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f" Did you mean '{by_lower[similar[0]]}'?" if similar else ""
