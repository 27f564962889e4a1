"""Tables of whole numbers beside a large file: found once, and then mapped by every process.

A file is a line of JSON about what the numbers belong to, filled up with blanks, and behind it the
numbers as int64.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlbench.regular_files import open_regular
from vlbench.text_files import parse_json, replace_when_written

INDEX_VERSION = 1
HEADER_BYTES = 512  # of the line about the file; the numbers begin at this byte
NUMBER_TYPE = np.dtype("<i8")


def read_numbers(
    index_file: str | Path, about: dict[str, Any]
) -> tuple[NDArray[np.int64], dict[str, Any]]:
    """Map a table whose line says all that `about` does; return it with that line.

    Raises OSError, and ValueError where it is of another version, of something else or damaged.
    """
    with open_regular(index_file) as opened:
        header = parse_json(opened.read(HEADER_BYTES))
        size = os.fstat(opened.fileno()).st_size - HEADER_BYTES
    if not isinstance(header, dict) or header.get("version") != INDEX_VERSION:
        raise ValueError("is not of this version")
    if any(header.get(key) != value for key, value in about.items()):
        raise ValueError("is of another file")
    shape = header.get("shape")
    if not isinstance(shape, list) or not all(type(count) is int and count > 0 for count in shape):
        raise ValueError("has no shape")
    if not shape or size != NUMBER_TYPE.itemsize * math.prod(shape):
        raise ValueError("is cut off")
    return np.memmap(index_file, NUMBER_TYPE, "r", HEADER_BYTES, tuple(shape)), header


def write_numbers(index_file: Path, numbers: NDArray[np.int64], about: dict[str, Any]) -> None:
    """Write a table, whole or not at all; raises OSError, and ValueError for too long a line."""
    header = json.dumps({"version": INDEX_VERSION, "shape": list(numbers.shape), **about}).encode()
    if len(header) > HEADER_BYTES:
        raise ValueError(f"has {len(header)} bytes about its file; at most {HEADER_BYTES} fit")
    with replace_when_written(index_file) as temporary:
        temporary.write_bytes(header.ljust(HEADER_BYTES) + numbers.astype(NUMBER_TYPE).tobytes())
