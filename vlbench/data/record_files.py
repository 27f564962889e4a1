"""Files with one record after another, any of which is read by its number. Imports no torch."""

from __future__ import annotations

import json
import os
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from vlbench.data.shard_sampler import MAX_LANES
from vlbench.errors import UserError
from vlbench.regular_files import MAX_DATA_BYTES, open_regular
from vlbench.text_files import LFS_POINTER

SIGNATURE_BYTES = 1 << 16  # of the beginning, in which a foreign format is looked for
FOREIGN_SIGNATURES = {
    b"\x1f\x8b": "is compressed (gzip); decompress it first",
    b"PK\x03\x04": "is a zip file; unpack it first",
    b"ARROW1": "is an Arrow file; write its rows as JSON records first (pandas.read_feather)",
    b"BZh": "is compressed (bzip2); decompress it first",
    b"\xfd7zXZ\x00": "is compressed (xz); decompress it first",
    b"\x28\xb5\x2f\xfd": "is compressed (zstd); decompress it first",
    b"\x80": "is a pickle or another binary file; write its records as JSON",
    b"\x89PNG": "is an image; expected records in JSON",
    b"\xff\xd8\xff": "is an image; expected records in JSON",
    BOM_UTF16_LE: "is text in UTF-16; save it as UTF-8",
    BOM_UTF16_BE: "is text in UTF-16; save it as UTF-8",
    b"<": "begins as a web page (HTML or XML), not as JSON; was it downloaded by its raw address?",
    LFS_POINTER: "is a Git-LFS pointer and not the file; run git lfs pull",
}
"""How files that are not JSON begin."""

FileStamp = tuple[int, int]
"""Size and modification time of a file, ns: another file of the same name has others."""


class RecordFile(Protocol):
    """Records with random access: a file of JSON or a table, or the rows of Parquet files."""

    name: str
    """What the user named."""
    stamps: list[FileStamp]
    """Of its files."""

    def __len__(self) -> int: ...

    @property
    def block_counts(self) -> Sequence[int] | None:
        """How many records each part has that is read at once; None where any order is as fast."""
        ...

    def pass_order(
        self,
        shuffle_key: str,
        block_counts: Sequence[int] | None = None,
        max_lanes: int = MAX_LANES,
    ) -> Callable[[int], int] | None:
        """Return the order of a pass over the records; None where any order is as fast.

        Of some of the records, `block_counts` says how many each part has. At most `max_lanes`
        lanes are read alternately.
        """
        ...

    def folder_of(self, index: int) -> Path:
        """Return where record `index` has its images if the user names no folder."""
        ...

    def read_record(self, index: int, with_images: bool = True) -> Any:
        """Return record `index` (from 0), or raise a UserError if it cannot be read any more.

        Without images their bytes may be left out, where a record holds them.
        """
        ...


class AnyOrder:
    """What records have in common of which any order is as fast: one folder has their images."""

    folder: Path

    @property
    def block_counts(self) -> None:
        """None: no part is read at once."""

    def pass_order(
        self,
        shuffle_key: str,
        block_counts: Sequence[int] | None = None,
        max_lanes: int = MAX_LANES,
    ) -> None:
        """Return None: they have no order of their own."""

    def folder_of(self, index: int) -> Path:
        """Return where names of images are looked up, the same for all records."""
        return self.folder


def file_stamp(file: str | Path | int) -> FileStamp:
    """Return what tells a file, or an open one by its number, from another one; raises OSError."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def read_range(file: str, stamp: FileStamp, start: int, end: int) -> bytes:
    """Return bytes of a file that had `stamp` when it was opened first; UserError if not."""
    try:
        with open_regular(file, MAX_DATA_BYTES) as opened:
            if file_stamp(opened.fileno()) != stamp:
                raise UserError("is another file than it was when it was opened")
            opened.seek(start)
            return opened.read(end - start)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a mapping of JSON; a UserError where a key has several values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next((key for key, value in pairs if found[key] != value), None)
        if twice is not None:
            raise UserError(f"has the key {twice!r} more than once, with different values")
    return found


RECORD_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)
"""The decoder of records: JSON takes the last of equal keys, which would lose the others."""


def read_beginning(file: Path) -> bytes:
    """Return how a file begins; a UserError where it is of a format that is not read."""
    with open_regular(file) as opened:
        beginning = opened.read(SIGNATURE_BYTES).removeprefix(BOM_UTF8).lstrip()
    for signature, problem in FOREIGN_SIGNATURES.items():
        if beginning.startswith(signature):
            raise UserError(problem)
    return beginning
