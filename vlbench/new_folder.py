"""A new folder that is never seen half-written, and names that are free."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from vlbench.errors import UserError
from vlbench.file_lock import hold_lock


def first_free_path(form: str) -> Path:
    """Return the first path of a form, such as "runs/compare-{}", that is not there, from 1 on."""
    paths = (Path(form.format(number)) for number in itertools.count(1))
    return next(path for path in paths if not path.exists())


def check_new_folder(folder: Path) -> None:
    """Refuse an `out=` that holds something, and the current folder: it would be replaced."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"out={folder} is there already and not empty; name a new folder")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UserError(f"out={folder} is the folder where this command runs; name a new one")


@contextlib.contextmanager
def write_new_folder(
    folder: Path, is_worth_keeping: Callable[[Path], bool] = lambda _: False
) -> Iterator[Path]:
    """Yield a folder beside `folder` that gets its name at the end of `with`.

    It is empty, unless one that was left half-written `is_worth_keeping`; others are removed. One
    process at a time writes it. `folder` is one that `check_new_folder` lets pass.
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
