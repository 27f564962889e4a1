"""Files by URL, read piece by piece through fsspec: https, s3, gs and all that it knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlbench.files import read_json
from vlbench.mistakes import Mistake


def is_url(name: str) -> bool:
    """Tell whether a file is named by URL instead of by path."""
    return "://" in name


def exists(name: str) -> bool:
    """Tell whether there is a file of that path or URL; a Mistake where nobody can be asked."""
    if not is_url(name):
        return Path(name).is_file()
    if _ask("exists", name):
        return True
    try:
        piece(name, 0, 1)  # a server that cannot be reached is "not there" for fsspec
    except Mistake as mistake:
        if isinstance(mistake.__cause__, FileNotFoundError):
            return False
        raise
    return True


def piece(url: str, offset: int = 0, size: int | None = None) -> bytes:
    """Return `size` bytes of a file from `offset` on, fewer where it ends; None: the whole file."""
    if size == 0:
        return b""
    some = {} if size is None else {"start": offset, "end": offset + size}
    data = bytes(_ask("cat_file", url, **some))
    if size is not None and len(data) > size:
        raise Mistake(
            f"{url}: its server gives the whole file where a part is asked for (python -m "
            "http.server does); serve shards with one that knows ranges of bytes"
        )
    return data


def length_of(url: str) -> int | None:
    """Return the bytes of a file; None where its server does not tell, or cannot be asked."""
    try:
        found = _ask("info", url).get("size")
    except Mistake:  # reading it will say what is wrong
        return None
    return found if isinstance(found, int) else None


def json_of(name: str) -> Any:
    """Return what a file of JSON holds."""
    if not is_url(name):
        return read_json(Path(name))
    try:
        return json.loads(piece(name))
    except ValueError as error:
        raise Mistake(f"{name}: is no JSON ({error})") from error


def _ask(what: str, url: str, **options: Any) -> Any:
    """Call a function of the file system that knows `url`."""
    import fsspec  # it is slow to import, and most data are local

    try:
        system, path = fsspec.core.url_to_fs(url)
        return getattr(system, what)(path, **options)
    except ImportError as error:  # s3fs and the like are installed by those who need them
        raise Mistake(f"{url}: {error}") from error
    except FileNotFoundError as error:
        raise Mistake(f"{url}: does not exist") from error
    except Exception as error:  # of any library of any kind of server
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise Mistake(f"{url}: cannot be read ({reason})") from error
