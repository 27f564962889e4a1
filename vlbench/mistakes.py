"""Mistakes of the user: what is wrong, what was given, what is allowed, said in one line each."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

LONGEST_WORD = 300  # characters without a space in a message; paths are shorter
CONTROL = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029]")
LONG_WORD = re.compile(rf"\S{{{LONGEST_WORD + 1},}}")


class Mistake(ValueError):
    """Something that the user can put right; one line of text per mistake, no stack trace.

    Longer words than LONGEST_WORD are shortened: a picture as text would fill the screen.
    """

    def __init__(self, *texts: object) -> None:
        """Take the text of the line."""
        super().__init__(*(shortened(one) if isinstance(one, str) else one for one in texts))


class Trouble(RuntimeError):
    """What went wrong on the machine and not in the command: one line, but exit code 1."""


class Place(NamedTuple):
    """Where a sample is from: the identity of its record."""

    source: str
    """Name of the source."""
    number: int
    """Of the source among those that a stage mixes, from 0."""
    record: int
    """Of the record in the source, from 1."""


class Placed(Protocol):
    """Something of which it may be known where it is from."""

    @property
    def place(self) -> Place | None: ...


class BadSample(Mistake):
    """One sample that cannot be learned from; it is named, and left out or stops the run."""

    def __init__(self, sample_id: str, reason: str) -> None:
        """Say in one line, `reason`, what is wrong with the sample `sample_id`."""
        super().__init__(sample_id, reason)  # both, so that it survives the way out of a worker
        self.sample_id = shortened(sample_id)
        self.reason = shortened(one_line(reason))
        self.source = ""
        self.record: int | None = None

    def at(self, source: str, record: int | None) -> BadSample:
        """Return it with its identity: the name of its source, and its record there (from 1)."""
        self.source, self.record = source, record
        return self

    def of(self, sample: Placed) -> BadSample:
        """Return it with the identity of `sample`, where that is known."""
        place = sample.place
        return self if place is None else self.at(place.source, place.record)

    @property
    def identity(self) -> tuple[str, int | str]:
        """Source and number of the record; ids are labels, and several records may have the same.

        Where no record is known, the id stands for it.
        """
        return self.source, self.sample_id if self.record is None else self.record

    @property
    def label(self) -> str:
        """The id, and the number of the record where it is known and not the id."""
        known = self.record is None or self.sample_id == f"record {self.record}"
        return one_line(self.sample_id if known else f"{self.sample_id} (record {self.record})")

    def __str__(self) -> str:
        """Return the line for the user."""
        return f"sample {self.label}: {self.reason}"


def shortened(text: str) -> str:
    """Return a text whose longest words are cut in the middle, with their lengths.

    Half of a surrogate pair, which cannot be printed, is escaped.
    """
    return LONG_WORD.sub(
        lambda word: f"{word[0][:80]}... ({len(word[0]):,} characters)", printable(text)
    )


def printable(text: str) -> str:
    """Return a text with halves of surrogate pairs (file names that are not UTF-8) escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def one_line(text: str) -> str:
    """Return a text that can be printed, with its line ends and control characters escaped."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], printable(text))


def kind_of(value: Any) -> str:
    """Name the JSON type of a value, with its beginning."""
    kinds = {dict: "a mapping", list: "a list", str: "a text", bool: "a truth value"}
    if value is None:
        return "null"
    text = json.dumps(value, ensure_ascii=False)
    return f"{kinds.get(type(value), 'a number')} ({text[:40]}{'...' if len(text) > 40 else ''})"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the name in `known` that is most like `name`, else ""."""
    by_lower = {one.lower(): one for one in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f" Did you mean '{by_lower[found[0]]}'?" if found else ""
