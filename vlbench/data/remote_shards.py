"""Files at a URL, read by byte ranges through fsspec: https, s3, gs and its other protocols."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vlbench.errors import UserError, one_line
from vlbench.regular_files import MAX_CONFIG_BYTES, format_bytes
from vlbench.text_files import parse_json, read_json

WEB_SCHEMES = ("http://", "https://")


def is_url(path_or_url: str) -> bool:
    """Tell whether a file name is a URL and not a path."""
    return "://" in path_or_url


def split_query(path_or_url: str) -> tuple[str, str]:
    """Return a URL of the web without its query, and the query with its `?`: "" if it has none.

    The file names of a path, and the keys of a store, may have a `?` in them.
    """
    base, mark, query = path_or_url.partition("?")
    is_web = any(scheme in base.lower() for scheme in WEB_SCHEMES)
    return (base, mark + query) if is_web else (path_or_url, "")


def shown_name(path_or_url: str) -> str:
    """Return what errors and samples call a file: a URL's query may hold a signature."""
    return split_query(path_or_url)[0]


def append_name(path_or_url: str, ending: str) -> str:
    """Return a path or URL with `ending` after its path, before its query."""
    base, query = split_query(path_or_url)
    return base + ending + query


def file_exists(path_or_url: str) -> bool:
    """Tell whether a file exists; a UserError where its server cannot be reached."""
    if not is_url(path_or_url):
        return Path(path_or_url).is_file()
    if _call_filesystem("exists", path_or_url):
        return True
    try:
        # fsspec also says "does not exist" of a server that cannot be reached
        read_byte_range(path_or_url, 0, 1)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return False
        raise
    return True


def read_byte_range(url: str, offset: int = 0, size: int | None = None) -> bytes:
    """Return `size` bytes from `offset` on, fewer where the file ends; None: the whole file."""
    if size == 0:
        return b""
    byte_range = {} if size is None else {"start": offset, "end": offset + size}
    data = bytes(_call_filesystem("cat_file", url, **byte_range))
    if size is not None and len(data) > size:
        raise UserError(
            f"{shown_name(url)}: its server ignores byte ranges and sends the whole file (as "
            "python -m http.server does); serve shards with one that supports ranges of bytes"
        )
    return data


def read_whole_file(url: str, max_bytes: int) -> bytes:
    """Return all bytes of a file; a UserError where it has more than `max_bytes`."""
    size = remote_file_size(url)
    if size is not None and size > max_bytes:
        allowed = format_bytes(max_bytes)
        raise UserError(f"{shown_name(url)}: has {format_bytes(size)}; at most {allowed} are read")
    return read_byte_range(url)


def remote_file_size(url: str) -> int | None:
    """Return the size of a file in bytes; None where its server does not report it."""
    try:
        size = _call_filesystem("info", url).get("size")
    except UserError:  # reading the file will report it
        return None
    return size if isinstance(size, int) else None


def read_json_file(path_or_url: str) -> Any:
    """Return the content of a JSON file."""
    if not is_url(path_or_url):
        return read_json(Path(path_or_url))
    try:
        return parse_json(read_whole_file(path_or_url, MAX_CONFIG_BYTES))
    except ValueError as error:
        raise UserError(f"{shown_name(path_or_url)}: is not JSON ({error})") from error


def _call_filesystem(method: str, url: str, **options: Any) -> Any:
    """Call a method of the fsspec file system of `url`."""
    import fsspec  # slow to import, and most data are local

    try:
        system, path = fsspec.core.url_to_fs(url)
        return getattr(system, method)(path, **options)
    except ImportError as error:  # s3fs and the like are not dependencies
        raise UserError(f"{shown_name(url)}: {error}") from error
    except FileNotFoundError as error:
        raise UserError(f"{shown_name(url)}: does not exist") from error
    except Exception as error:  # any library for any protocol
        reason = one_line(re.sub(r"\?[^\s'\")]+", "?...", str(error)) or error)  # its query
        raise UserError(f"{shown_name(url)}: cannot be read ({reason})") from error
