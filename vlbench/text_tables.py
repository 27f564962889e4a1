"""Tables and lists of plain text: columns as wide as their longest cell, names that are many."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vlbench.errors import escape_to_one_line


def format_table(rows: Sequence[Sequence[str]], alignment: str = "<") -> list[str]:
    """Return rows of cells as lines of text in which the columns stand below each other.

    Args:
        rows: The cells `[rows][columns]`; every row has the same number of columns.
        alignment: "<" (left) or ">" (right) for each column; the last one goes for further columns.
    """
    rows = [[escape_to_one_line(cell) for cell in row] for row in rows]
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    sides = alignment.ljust(len(columns), alignment[-1])
    return [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def list_some(names: Sequence[str], most: int) -> str:
    """Return "a, b and 3 more": names with commas between them, at most so many."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def markdown_text(text: str) -> str:
    """Return a text as one line of Markdown, in a cell or in code.

    No bar or backtick acts, no tag of HTML begins and no link.
    """
    line = escape_to_one_line(text).replace("|", "\\|").replace("`", "'")
    return re.sub(r"<(?=[A-Za-z/!?])|(?<=\])\(", r"\\\g<0>", line)
