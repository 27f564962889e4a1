"""What the scorers of MMMU and CMMMU have in common: bare text, tails after a cue, numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

PUNCTUATION = (",", ".", "!", "?", ";", ":", "'")  # in the order in which both scorers take it off

AnswerValue = str | float


def strip_punctuation(response: str) -> str:
    """Return the response without punctuation at its ends, between single spaces.

    One mark after the other, each once: "B.!" becomes " B. ".
    """
    for mark in PUNCTUATION:
        response = response.strip(mark)
    return f" {response} "


def texts_after_cues(
    whole: str, parts: Sequence[str], cues: Sequence[str], last_part_cues: Sequence[str] = ()
) -> list[str]:
    """Return of every part the shortest text after a cue; [whole] if no part has any.

    The cues `last` count in the last part alone. A cue that ends its part leaves nothing, and the
    next cue's text is taken then, however long; a single mark of punctuation is no text.
    """
    found = []
    for place, part in enumerate(parts, 1):
        shortest = ""
        for cue in (*cues, *last_part_cues) if place == len(parts) else cues:
            if cue in part:
                tail = part.split(cue)[-1].strip()
                if not shortest or len(tail) < len(shortest):
                    shortest = tail
        if shortest and shortest not in PUNCTUATION:
            found.append(shortest)
    return found or [whole]


def parse_number(text: str) -> float | None:
    """Return a text as a number of two decimals, None if it is none; commas are left out.

    It is a number if Python says so: nan, inf, 1_000 and full-width digits are.
    """
    try:
        return round(float(text.replace(",", "")), 2)
    except ValueError:
        return None


def number_patterns(comma: str, boundary: str, not_followed_by: str) -> tuple[re.Pattern[str], ...]:
    """Return the patterns of numbers in a text: with `comma` in them, scientific, plain.

    `edge` is what bounds whole numbers, `follows` what may not follow a plain one.
    """
    return (
        re.compile(rf"-?{boundary}\d{{1,3}}(?:{comma}\d{{3}})+{boundary}"),
        re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
        re.compile(rf"-?(?:\d*\.\d+|\d+{boundary})(?![eE][+-]?\d)(?!{not_followed_by})"),
    )


def find_numbers(texts: Iterable[str], patterns: Sequence[re.Pattern[str]]) -> list[str]:
    """Return the numbers in the texts as they are written there; parts of one are found too."""
    return [found for text in texts for form in patterns for found in form.findall(text)]


def distinct_values(values: Iterable[AnswerValue]) -> list[AnswerValue]:
    """Return the values once each: numbers, then texts, in order."""
    return sorted(set(values), key=lambda value: (isinstance(value, str), value))


def has_any_gold(predicted_values: Iterable[AnswerValue], golds: Sequence[object]) -> bool:
    """Say whether a gold text is part of a predicted text, or a gold number among the numbers."""
    texts = [gold for gold in golds if isinstance(gold, str)]
    return any(
        any(gold in value for gold in texts) if isinstance(value, str) else value in golds
        for value in predicted_values
    )
