"""Patterns in a tokenizer.json that would hang: their form is limited before the library has them.

The library's expressions backtrack: `(a+)+$` takes twice the time for every further character. So
what is repeated may not itself match in several ways, and an alternative has few open repetitions.
All published tokenizers keep within that (GPT-2, o200k, Llama 3 and 4, Qwen, DeepSeek, CLIP). Texts
that grow by replacing are limited too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vlbench.errors import UserError

MAX_PATTERN_LENGTH = 4_096  # characters; o200k's has 350
MAX_PATTERNS = 64  # of a file; DeepSeek's has 3
MAX_DEPTH = 50  # of brackets
MAX_REPEATS = 1_000  # of what is repeated a limited number of times, nested ones multiplied
MAX_OPEN_REPEATS = 2  # of an alternative: with n of them a text costs its length to the power n + 1
MAX_CHOICES = 8  # of an alternative: repetitions of any kind that may end earlier
MAX_GROWTH = 64  # times that replacements may lengthen a text
_TOKEN = re.compile(
    r"(?P<refused>\\[1-9kg]|\(\?~|\(\?\(|\(\?\{)"
    r"|(?P<open>\((?:\?(?:[imxsadu-]*:|=|!|<=|<!|>|P?<\w+>))?)"
    r"|(?P<ignored>\(\?#[^)]*\)|\(\?[imxsadu-]+\))"
    r"|(?P<close>\))|(?P<bar>\|)"
    r"|(?P<repeat>(?:[*+?]|\{\d+(?:,\d*)?\}|\{,\d+\})[?+]?)"
    r"|(?P<single>\\(?:[pP]\{[^}]*\}|x\{[^}]*\}|.)|.)",
    re.DOTALL,
)


class _Form(NamedTuple):
    """What an expression, or a part of one, can do."""

    open_repeats: int = 0
    choices: int = 0
    size: int = 1
    """Times that its largest part is repeated, where that is limited."""
    has_alternatives: bool = False
    first: str | None = None
    """The character that it begins with; None where it has several."""


class _Refused(ValueError):
    """Why a pattern is not read."""


def check_patterns(said: Any, file: Path) -> None:
    """Refuse the patterns and replacements of a tokenizer.json that could hang; `said` is its JSON.

    Raises a UserError that names the file and the pattern.
    """
    nodes = [node for node in _mappings(said) if "Regex" in node or node.get("type") == "Replace"]
    patterns = [node["Regex"] for node in nodes if "Regex" in node]
    if len(patterns) > MAX_PATTERNS:
        raise UserError(f"{file}: has {len(patterns):,} patterns; at most {MAX_PATTERNS} are read")
    for pattern in patterns:
        reason = pattern_refusal(pattern)
        if reason:
            raise UserError(f"{file}: its pattern {pattern!r:.80} {reason}")
    growth = math.prod(_growth(node) for node in nodes if node.get("type") == "Replace")
    if growth > MAX_GROWTH:
        raise UserError(
            f"{file}: its replacements make a text up to {growth:,} times as long; at most "
            f"{MAX_GROWTH} times is allowed"
        )


def pattern_refusal(pattern: Any) -> str:
    """Return why a pattern is not read, as the end of a sentence; "" for one that is."""
    if not isinstance(pattern, str):
        return "is no text"
    if len(pattern) > MAX_PATTERN_LENGTH:
        return f"has {len(pattern):,} characters; at most {MAX_PATTERN_LENGTH:,} are read"
    try:
        form = _Parser(pattern).parse_alternatives(0)
    except _Refused as refused:
        return str(refused)
    if form.size > MAX_REPEATS:
        return f"repeats something {form.size:,} times; at most {MAX_REPEATS:,} is allowed"
    return ""


def _mappings(value: Any) -> Iterator[dict[str, Any]]:
    """Yield the mappings in a JSON value, those of the vocabulary left out."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield one
            waiting += [item for key, item in one.items() if key not in ("vocab", "merges")]
        elif isinstance(one, list):
            waiting += one


def _growth(replacement: dict[str, Any]) -> int:
    """Return how many times as long a text may be after a replacement, rounded up."""
    pattern, content = replacement.get("pattern"), replacement.get("content")
    matched = pattern.get("String", "") if isinstance(pattern, dict) else ""
    length = len(content) if isinstance(content, str) else 0
    shortest = len(matched) if isinstance(matched, str) and matched else 1
    return max(1, -(-length // shortest))


class _Parser:
    """Reads an expression from left to right; what it cannot read the library judges."""

    def __init__(self, pattern: str) -> None:
        self._pattern, self._position = pattern, 0

    def parse_alternatives(self, depth: int) -> _Form:
        """Return the form of alternatives, up to the bracket that closes them or the end."""
        if depth > MAX_DEPTH:
            raise _Refused(f"has brackets more than {MAX_DEPTH} deep")
        branches = [self._parse_branch(depth)]
        while self._peek() == "|":
            self._position += 1
            branches.append(self._parse_branch(depth))
        starts = [branch.first and branch.first.lower() for branch in branches]  # as with (?i:
        is_clear = len(starts) == 1 or (None not in starts and len(set(starts)) == len(starts))
        return _Form(
            max(branch.open_repeats for branch in branches),
            max(branch.choices for branch in branches),
            max(branch.size for branch in branches),
            any(branch.has_alternatives for branch in branches)
            or not (is_clear or len(starts) < 2),
            starts[0] if len(starts) == 1 else None,
        )

    def _peek(self) -> str:
        return self._pattern[self._position : self._position + 1]

    def _parse_branch(self, depth: int) -> _Form:
        items: list[_Form] = []
        while self._peek() not in ("", "|", ")"):
            item = self._parse_item(depth)
            if item is not None:
                items.append(self._parse_repeat(item))
        form = _Form(
            sum(item.open_repeats for item in items),
            sum(item.choices for item in items),
            max((item.size for item in items), default=1),
            any(item.has_alternatives for item in items),
            items[0].first if items else None,
        )
        if form.open_repeats > MAX_OPEN_REPEATS:
            raise _Refused(f"has more than {MAX_OPEN_REPEATS} open repetitions in an alternative")
        if form.choices > MAX_CHOICES:
            raise _Refused(f"has more than {MAX_CHOICES} repetitions in an alternative")
        return form

    def _parse_item(self, depth: int) -> _Form | None:
        """Return the form of a character, a set or a group; None for what matches nothing."""
        if self._peek() == "[":
            self._skip_set()
            return _Form()
        token = _TOKEN.match(self._pattern, self._position)
        assert token is not None  # the last choice takes any character
        self._position = token.end()
        if token["refused"]:
            raise _Refused(f"has {token[0]}, which is not read: references cost any time")
        if token["ignored"] or token["repeat"]:
            return None
        if token["open"]:
            form = self.parse_alternatives(depth + 1)
            self._position += 1  # the bracket
            return form
        is_one = token[0][0] != "\\" and token[0] not in ".^$"
        return _Form(first=token[0] if is_one or token[0] in (r"\r", r"\n", r"\t") else None)

    def _skip_set(self) -> None:
        """Go behind a set of characters, in which there may be others."""
        depth = 0
        while self._position < len(self._pattern):
            character = self._peek()
            following = self._pattern[self._position + 1 : self._position + 3]
            if depth and character == "[" and following.removeprefix("^").startswith("]"):
                raise _Refused("has a bracket in a set of characters; write it as \\[")
            self._position += 2 if character == "\\" else 1
            depth += (character == "[") - (character == "]")
            if not depth:
                return

    def _parse_repeat(self, item: _Form) -> _Form:
        """Return the form of an item with the repetitions that follow it."""
        while True:
            token = _TOKEN.match(self._pattern, self._position)
            if token is None or not token["repeat"]:
                return item
            self._position = token.end()
            least, most = _repeat_limits(token["repeat"])
            if most > 1 and (item.choices or item.has_alternatives):
                raise _Refused("repeats what can itself match in several ways")
            if most == math.inf:
                item = item._replace(open_repeats=item.open_repeats + 1, choices=item.choices + 1)
            else:
                item = item._replace(
                    choices=item.choices + (least != most), size=item.size * max(1, int(most))
                )
            if least == 0:
                item = item._replace(first=None)


def _repeat_limits(text: str) -> tuple[int, float]:
    """Return how often something is repeated at least and at most."""
    plain = {"*": (0, math.inf), "+": (1, math.inf), "?": (0, 1)}
    if text[0] in plain:
        return plain[text[0]]
    least, comma, most = text[1 : text.index("}")].partition(",")
    lowest = int(least[:9] or 0)
    if not comma:
        return lowest, lowest
    return lowest, int(most[:9]) if most else math.inf
