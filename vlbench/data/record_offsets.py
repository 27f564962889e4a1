"""Where each record of a file begins: found once, and kept beside a file that is large.

    data.json            the records
    data.json.index      a line about the file, and behind it the first byte of each record, int64

The numbers are memory-mapped, so that the processes of a machine share them: 8 MB for a million
records. Where the folder is not writable, every process that opens the file finds them anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlbench.data.kept_numbers import read_numbers, write_numbers
from vlbench.data.record_files import FileStamp, file_stamp

MIN_INDEXED_BYTES = 1 << 26  # 67 MB: a smaller file is searched in less than a second


@dataclass(frozen=True)
class RecordOffsets:
    """The first byte of each record, and behind them the byte at which the last one has ended."""

    offsets: NDArray[np.int64]
    stamp: FileStamp
    """Of the file in which they are."""
    index_file: str = ""
    """Where they are kept; "" for nowhere."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def record_range(self, index: int) -> tuple[int, int]:
        """Return the bytes of record `index` (from 0), with what separates it from the next."""
        return int(self.offsets[index]), int(self.offsets[index + 1])

    def __reduce__(self) -> tuple[Any, ...]:
        """Let another process map the index itself, instead of copying it."""
        if self.index_file:
            return _read_index, (self.index_file, self.stamp)
        return RecordOffsets, (self.offsets, self.stamp)


def find_offsets(
    file: Path, reader: str, scan: Callable[[Path], NDArray[np.int64]]
) -> RecordOffsets:
    """Return the offsets of a file's records from its index, or by `scan`, which makes the index.

    `reader` tells the indexes of several readers apart. Raises OSError and what `scan` raises.
    """
    stamp = file_stamp(file)  # taken first: a file that changes meanwhile is searched again
    if stamp[0] < MIN_INDEXED_BYTES:
        return RecordOffsets(scan(file), stamp)
    index_file = f"{file}.index"
    with contextlib.suppress(OSError, ValueError):  # it is missing, or of another file
        return _read_index(index_file, stamp, reader)
    offsets = scan(file)
    with contextlib.suppress(OSError, ValueError):  # the folder is not writable, the disk full
        _write_index(Path(index_file), offsets, {"reader": reader, "stamp": stamp})
        return _read_index(index_file, stamp, reader)
    return RecordOffsets(offsets, stamp)


def _read_index(index_file: str, stamp: FileStamp, reader: str = "") -> RecordOffsets:
    """Map an index; ValueError where it is of another file, of another reader or damaged."""
    about = {"stamp": list(stamp), **({"reader": reader} if reader else {})}
    offsets, header = read_numbers(index_file, about)
    if offsets.ndim != 1 or header.get("records") != len(offsets) - 1 or len(offsets) < 2:
        raise ValueError("is of another kind")
    if offsets[0] < 0 or offsets[-1] > stamp[0]:
        raise ValueError("has numbers that are not in the file")
    return RecordOffsets(offsets, stamp, index_file)


def _write_index(index_file: Path, offsets: NDArray[np.int64], about: dict[str, Any]) -> None:
    write_numbers(index_file, offsets, {"records": len(offsets) - 1, **about})
