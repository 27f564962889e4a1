"""What may stand in a cell of a benchmark's data: lists in strings, withheld answers, pictures."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

from vlbench.errors import UserError
from vlbench.evaluate.tasks.benchmark_types import RecordImage
from vlbench.process_settings import ignore_thread_warnings

WITHHELD_ANSWERS = (None, "", "?")  # answers of test splits


def parse_literal(text: str) -> Any:
    """Return the value of a Python literal, None for a text that is none."""
    with ignore_thread_warnings():  # Python remarks on escapes like \f in "\frac"
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return None


def parse_options(cell: Any, record_id: str) -> tuple[str, ...]:
    """Return the options of a cell: a list, or a text that is a list for Python.

    Raises a Mistake that names the record where it is neither.
    """
    value = parse_literal(cell) if isinstance(cell, str) else cell
    if not isinstance(value, list | tuple):
        given = f"{cell!r:.100}"
        raise UserError(
            f"record {record_id}: its options are {given}; wanted is a list as in Python"
        )
    return tuple(str(option) for option in value)


def parse_answer(cell: Any) -> str | tuple[str, ...] | None:
    """Return the answer of a cell, None where it is withheld.

    Several right answers are a list, or a text that is a list of texts for Python; a list of
    numbers in a text, like [0, 1], is an interval or a vector and stays a text.
    """
    if isinstance(cell, list | tuple):
        return tuple(str(answer) for answer in cell)
    if cell in WITHHELD_ANSWERS:
        return None
    several = (
        parse_literal(cell) if isinstance(cell, str) and cell.lstrip().startswith("[") else None
    )
    if several and isinstance(several, list) and all(isinstance(one, str) for one in several):
        return tuple(several)
    return str(cell)


def parse_image(cell: Any, record_id: str, file_names: Iterable[str | None]) -> RecordImage | None:
    """Return the picture of a cell, None for an empty one.

    A cell holds the bytes of a file, alone or with its path. The first of `names` that is given
    is the picture's name, else that in the path. A name without bytes is a picture that is missed
    when it is opened.
    """
    cell = cell if isinstance(cell, dict) else {"bytes": cell}
    path = cell.get("path")
    name = next(filter(None, file_names), None) or (PurePosixPath(path).name if path else "")
    if cell.get("bytes") is None and not name:
        return None
    return RecordImage(record_id, name, cell.get("bytes") or b"")
