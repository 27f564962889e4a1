"""Answers that are a letter of options which the question does not show. Imports no torch.

Tables of multiple-choice questions (MMBench's, ScienceQA's) have the options in columns of their
own. Without them a letter stands for nothing, and would be learned, or judged, as a guess.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from vlbench.data.record_keys import EMPTY_VALUES
from vlbench.data.sample import ChatTurn
from vlbench.errors import BadSample

OPTION_KEYS = ("options", "choices")
LETTER_ANSWER = re.compile(r"\(?([A-Z])\)?[.:]?")


def refuse_hidden_options(name: str, turns: Sequence[ChatTurn], record: Mapping[str, Any]) -> None:
    """Raise BadSample for a first answer that is the letter of an option shown nowhere before it.

    Options are a list or a mapping in one of OPTION_KEYS, or have their letters as keys.
    """
    number = next((n for n, turn in enumerate(turns) if turn.role == "assistant"), 0)
    letter = LETTER_ANSWER.fullmatch(turns[number].text.strip())
    if not number or letter is None:
        return
    key, options = _find_options(record)
    shown = "".join(turn.text for turn in turns[:number]).lower()
    if letter[1] in options and not any(text.lower() in shown for text in options.values()):
        raise BadSample(
            name,
            f"the answer is {turns[number].text.strip()!r}, one of {key}, and the question does "
            "not show them: write them into the question",
        )


def _find_options(record: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """Return what the options of a record are called, and their texts by letter."""
    for key in OPTION_KEYS:
        value = record.get(key)
        labels: Any = string.ascii_uppercase
        if isinstance(value, Mapping) and value.keys() == {"label", "text"}:  # as ARC has them
            labels, value = value["label"], value["text"]
        if isinstance(value, list) and isinstance(labels, str | list):
            value = dict(zip(labels, value, strict=False))
        if isinstance(value, Mapping) and value:
            return repr(key), _texts_of(value)
    letters = [one for one in string.ascii_uppercase if record.get(one) not in EMPTY_VALUES]
    if letters[:2] != ["A", "B"]:
        return "", {}
    return f"the options {' '.join(letters)}", _texts_of({one: record[one] for one in letters})


def _texts_of(options: Mapping[str, Any]) -> dict[str, str]:
    return {str(name): str(text) for name, text in options.items() if text not in EMPTY_VALUES}
