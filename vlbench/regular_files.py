"""The one way to open a file that was there before: a regular file, of a limited size.

A device such as /dev/zero never ends, a named pipe waits for a writer, and a file in /proc has no
size: opening or reading them fills the memory or hangs. So they are refused before they are read,
and what is read whole has a limit by its kind, which is far above any sensible file.
"""

from __future__ import annotations

import os
import stat
from io import BufferedRandom, BufferedReader
from pathlib import Path

from vlbench.errors import UserError, one_line

MAX_CONFIG_BYTES = 1 << 28  # 268 MB: JSON, YAML, CSV; the largest tokenizer.json have 40 MB
MAX_RECORDS_BYTES = 1 << 33  # 8.6 GB: answers, lists and indexes with a line per sample
MAX_DATA_BYTES = 1 << 36  # 69 GB: conversations in JSON, which are parsed in memory
MAX_IMAGE_BYTES = 600_000_000  # an uncompressed RGB image of 178 megapixels has 537 MB
CHUNK_BYTES = 1 << 24  # of text read at once
_FILE_KINDS = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def irregular_kind(status: os.stat_result) -> str:
    """Return what a file is that is no regular file, "" for one that is."""
    kinds = (name for is_kind, name in _FILE_KINDS if is_kind(status.st_mode))
    return "" if stat.S_ISREG(status.st_mode) else next(kinds, "something else")


def open_regular(path: str | Path, max_bytes: int | None = None) -> BufferedReader:
    """Open a regular file of at most `max_bytes` for reading.

    Raises OSError as `open` does, and a UserError that begins with "is" or "has", without the
    name, for anything that is no regular file or is larger.
    """
    _check_status(os.stat(path), None)  # first, as opening a device may act on it
    file = open(path, "rb", opener=_open_without_waiting)
    try:
        _check_status(os.fstat(file.fileno()), max_bytes)  # again: it may have been replaced
    except UserError:
        file.close()
        raise
    return file


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has neither pipes nor it


def _check_status(status: os.stat_result, max_bytes: int | None) -> None:
    kind = irregular_kind(status)
    if kind:
        raise UserError(f"is {kind}, not a file")
    if max_bytes is not None and status.st_size > max_bytes:
        size = format_bytes(status.st_size)
        raise UserError(f"has {size}; at most {format_bytes(max_bytes)} are read")


def open_to_append(path: str | Path) -> BufferedRandom:
    """Open a regular file for reading and appending; it is made if it is not there.

    Raises as `open_regular` does, also for a link: in a folder that came from others it could lead
    to any file of the user's.
    """
    file = open(path, "ab+", opener=_open_without_following)
    try:
        _check_status(os.fstat(file.fileno()), None)
    except UserError:
        file.close()
        raise
    return file


def _open_without_following(path: str, flags: int) -> int:
    if os.path.lexists(path):  # first, as a pipe waits and a device acts
        _check_status(os.lstat(path), None)
    flags |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    return os.open(path, flags, 0o666)


def read_regular(path: str | Path, max_bytes: int) -> bytes:
    """Return the bytes of a regular file; raises as `open_regular` does."""
    with open_regular(path, max_bytes) as file:
        return file.read(os.fstat(file.fileno()).st_size)  # files in /proc have more than they say


def read_regular_text(path: str | Path, max_bytes: int, errors: str = "strict") -> str:
    """Return a text in UTF-8 without its byte-order mark; raises as `open_regular` does.

    No text has a byte 0: what follows one is not read, so that a sparse file takes no memory.
    Raises UnicodeDecodeError for what is not UTF-8, unless `errors` (of `bytes.decode`) allows it.
    """
    data, has_zero = read_until_zero(path, max_bytes)
    text = data.decode("utf-8-sig", errors)
    if has_zero:
        raise UserError(f"is no text: its byte {len(data) + 1} is 0")
    return text


def read_until_zero(path: str | Path, max_bytes: int) -> tuple[bytearray, bool]:
    """Return the bytes before the first 0, and whether there is one; raises as `open_regular`."""
    data, zero = bytearray(), b""
    with open_regular(path, max_bytes) as file:
        bytes_left = os.fstat(file.fileno()).st_size
        while chunk := file.read(min(CHUNK_BYTES, bytes_left)):
            bytes_left -= len(chunk)
            before_zero, zero, _ = chunk.partition(b"\0")
            data += before_zero
            if zero:
                break
    return data, bool(zero)


def describe_failure(error: OSError | ValueError) -> str:
    """Return why a file cannot be opened or read, as a clause without its name."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    reason = getattr(error, "strerror", None) or one_line(error, max_lines=1)
    return f"cannot be opened ({reason})"


def format_bytes(count: int) -> str:
    """Return a number of bytes in decimal units, as 537 MB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.{int(count < 10 * size)}f} {unit}"
    return f"{count} bytes"
