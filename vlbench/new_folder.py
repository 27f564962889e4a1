"""A new folder that is never seen half-written."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from vlbench.file_lock import hold_lock


@contextlib.contextmanager
def write_new_folder(
    folder: Path, is_worth_keeping: Callable[[Path], bool] = lambda _: False
) -> Iterator[Path]:
    """Yield a folder beside `folder` that gets its name at the end of `with`.

    It is empty, unless one that was left half-written `is_worth_keeping`; others are removed. One
    process at a time writes it. `folder` must not exist, or be empty.
    """
    writing = folder.with_name(f".writing-{folder.name}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(writing.with_name(f"{writing.name}.lock"), f"out={folder}"):
        if not is_worth_keeping(writing):
            shutil.rmtree(writing, ignore_errors=True)
        try:
            writing.mkdir(exist_ok=True)
            yield writing
            if folder.exists():
                folder.rmdir()
            writing.rename(folder)
        finally:
            if not is_worth_keeping(writing):
                shutil.rmtree(writing, ignore_errors=True)
