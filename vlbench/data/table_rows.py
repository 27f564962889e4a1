"""The cells of a row in a table of text: CSV (RFC 4180), or TSV. Imports no torch.

Written anew beside the `csv` module, which returns a row of another content where quotes are wrong:
of a cell that never closes it makes all rows to the end of the file one row. Its cells have a limit
of length, too, which is a setting of the whole process.
"""

from __future__ import annotations

import re

from vlbench.errors import UserError

_QUOTED_CELL = re.compile(r'"((?:[^"]++|"")*+)"')


class OpenCell(UserError):
    """A row whose last cell in quotes goes on behind the text, or has no end."""


def split_row(text: str, delimiter: str) -> list[str]:
    """Return the cells of the first row of a text.

    A cell in quotes may hold delimiters, line ends and doubled quotes; quotes inside of a cell that
    does not begin with one are text.

    Raises:
        OpenCell: The text ends inside of quotes.
        UserError: A text stands behind quotes, or a quoted cell of a TSV holds line ends and tabs:
            rows of a table without quoting, one of which begins with a quote.
    """
    if '"' not in text:
        return text.partition("\n")[0].removesuffix("\r").split(delimiter)
    cells: list[str] = []
    position = 0
    while True:
        if text.startswith('"', position):
            cell, position = _read_quoted(text, position, len(cells) + 1, delimiter)
        else:
            ends = (text.find(delimiter, position), text.find("\n", position))
            end = min((end for end in ends if end >= 0), default=len(text))
            cell, position = text[position:end], end
            if text[end : end + 1] != delimiter:  # the last one of a line, which may end with CR
                cell = cell.removesuffix("\r")
        cells.append(cell)
        if not text.startswith(delimiter, position):
            return cells
        position += 1


def _read_quoted(text: str, start: int, number: int, delimiter: str) -> tuple[str, int]:
    """Return the cell in quotes that begins at `start`, and the position behind it."""
    match = _QUOTED_CELL.match(text, start)
    if match is None:
        raise OpenCell(f"has a quote at the beginning of cell {number} that is never closed")
    cell, end = match[1].replace('""', '"'), match.end()
    following = text[end : end + 2]
    if following[:1] not in ("", delimiter, "\n") and following != "\r\n" and following != "\r":
        raise UserError(
            f"has text behind the closing quote of cell {number}; inside of quotes a quote is "
            'written twice, as ""'
        )
    if delimiter == "\t" and "\n" in cell and "\t" in cell:
        raise UserError(
            f"has a quote at the beginning of cell {number} that is closed only in a later line"
        )
    return cell, end
