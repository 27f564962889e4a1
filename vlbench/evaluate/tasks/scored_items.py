"""One answered question of a benchmark, and what a protocol says about it."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlbench.errors import UserError


@dataclass(frozen=True)
class AnsweredItem:
    """One answered question; `options` are in the order of their letters, `answer` is the truth.

    `answer` is a list where several are right. `response`, and an option, may be no text: some
    readers need none, as in the benchmarks' own code, and the others say so in a Mistake.
    """

    id: str | int
    type: str
    options: Sequence[str | None]
    answer: Any
    response: Any
    subject: str = ""


@dataclass(frozen=True)
class ScoredItem:
    """An item, the answer that was read from its response, and whether that is right.

    `prediction` is a letter or word, a list of texts and numbers, or None where nothing could be
    read; `fallback` says that it was drawn at random because nothing could be read.
    """

    item: AnsweredItem
    prediction: Any
    correct: bool
    fallback: bool


def option_letters(options: Sequence[object]) -> str:
    """Return the letters of the options: A, B, C ..."""
    return string.ascii_uppercase[: len(options)]


def require_text(item: AnsweredItem, value: object, value_name: str) -> str:
    """Return `value` if it is text; a Mistake for anything else, at which the references stop."""
    if not isinstance(value, str):
        given = json.dumps(value, ensure_ascii=False, default=str)
        raise UserError(f"{item.id}: {value_name} is {given:.60}; it must be text")
    return value
