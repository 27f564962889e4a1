"""Small files of text, read as UTF-8; what is wrong with one becomes a line that names it."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlbench.mistakes import Mistake

POINTER = b"version https://git-lfs"


def read_text(path: Path) -> str:
    """Return the text of a file; a mark of its byte order at the beginning is no part of it."""
    refuse_pointer(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise Mistake(f"{path}: is not UTF-8 text (byte {error.start + 1})") from error
    except OSError as error:
        raise Mistake(f"{path}: {error.strerror}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    try:
        value = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise Mistake(f"{path}: is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise Mistake(f"{path}: is not a JSON object")
    return value


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file with a header, [] if there is no such file."""
    return list(csv.DictReader(io.StringIO(read_text(path)))) if path.is_file() else []


def lines_of(text: str) -> list[str]:
    """Return the lines of a text that end with a line feed, without what ends them.

    str.splitlines would also cut at U+2028, U+2029 and U+0085, which stand in JSON texts as they
    are. Empty lines are left out.
    """
    return [line.removesuffix("\r") for line in text.split("\n") if line.strip()]


def json_lines(records: Iterable[object]) -> str:
    """Return records as JSON, one to a line."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_whole(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it, so that it is never seen half."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8", newline="")
    os.replace(temporary, path)


def refuse_pointer(path: Path) -> None:
    """Raise a Mistake for a file that Git LFS has not fetched yet, or that cannot be opened."""
    try:
        with path.open("rb") as file:
            begins = file.read(len(POINTER))
    except OSError as error:
        raise Mistake(f"{path}: {error.strerror}") from error
    if begins == POINTER:
        raise Mistake(f"{path}: is a Git-LFS pointer and not the file; run git lfs pull")
