"""A new folder that is never seen half-written."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from vlbench.file_lock import hold_lock


@contextlib.contextmanager
def write_new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder` that gets its name at the end of `with`.

    One process at a time writes it; what is left half-written is removed. `folder` must not exist,
    or be empty.
    """
    writing = folder.with_name(f".writing-{folder.name}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(writing.with_name(f"{writing.name}.lock"), f"out={folder}"):
        shutil.rmtree(writing, ignore_errors=True)
        try:
            writing.mkdir()
            yield writing
            if folder.exists():
                folder.rmdir()
            writing.rename(folder)
        finally:
            shutil.rmtree(writing, ignore_errors=True)
