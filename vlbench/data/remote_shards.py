"""Files by URL, read piece by piece through fsspec: https, s3, gs and all that it knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlbench.errors import UserError, one_line
from vlbench.text_files import read_json


def is_url(path_or_url: str) -> bool:
    """Tell whether a file is named by URL instead of by path."""
    return "://" in path_or_url


def file_exists(path_or_url: str) -> bool:
    """Tell whether there is a file of that path or URL; a Mistake where nobody can be asked."""
    if not is_url(path_or_url):
        return Path(path_or_url).is_file()
    if _call_filesystem("exists", path_or_url):
        return True
    try:
        read_byte_range(
            path_or_url, 0, 1
        )  # a server that cannot be reached is "not there" for fsspec
    except UserError as mistake:
        if isinstance(mistake.__cause__, FileNotFoundError):
            return False
        raise
    return True


def read_byte_range(url: str, offset: int = 0, size: int | None = None) -> bytes:
    """Return `size` bytes of a file from `offset` on, fewer where it ends; None: the whole file."""
    if size == 0:
        return b""
    some = {} if size is None else {"start": offset, "end": offset + size}
    data = bytes(_call_filesystem("cat_file", url, **some))
    if size is not None and len(data) > size:
        raise UserError(
            f"{url}: its server gives the whole file where a part is asked for (python -m "
            "http.server does); serve shards with one that knows ranges of bytes"
        )
    return data


def remote_file_size(url: str) -> int | None:
    """Return the bytes of a file; None where its server does not tell, or cannot be asked."""
    try:
        found = _call_filesystem("info", url).get("size")
    except UserError:  # reading it will say what is wrong
        return None
    return found if isinstance(found, int) else None


def read_json_file(path_or_url: str) -> Any:
    """Return what a file of JSON holds."""
    if not is_url(path_or_url):
        return read_json(Path(path_or_url))
    try:
        return json.loads(read_byte_range(path_or_url))
    except ValueError as error:
        raise UserError(f"{path_or_url}: is no JSON ({error})") from error


def _call_filesystem(method: str, url: str, **options: Any) -> Any:
    """Call a function of the file system that knows `url`."""
    import fsspec  # it is slow to import, and most data are local

    try:
        system, path = fsspec.core.url_to_fs(url)
        return getattr(system, method)(path, **options)
    except ImportError as error:  # s3fs and the like are installed by those who need them
        raise UserError(f"{url}: {error}") from error
    except FileNotFoundError as error:
        raise UserError(f"{url}: does not exist") from error
    except Exception as error:  # of any library of any kind of server
        reason = one_line(error)
        raise UserError(f"{url}: cannot be read ({reason})") from error
