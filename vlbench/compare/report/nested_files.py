"""Files of one name anywhere below a folder, also in folders that are linked into it.

Runs of others, or on another disk, are gathered for a report by symbolic links, which `Path.rglob`
does not follow. A folder that is reached twice counts once: links as `latest` stand beside what
they point to, and a link may point to a folder that it lies in.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def files_below(folder: Path, name: str) -> list[Path]:
    """Return the files called `name` in `folder` and below it, sorted, links followed.

    Folders that may not be read are passed over; [] where there is no such folder.
    """
    return sorted(_find_files(folder, name, set()))


def _find_files(folder: Path, name: str, seen: set[str]) -> Iterator[Path]:
    """Yield the files called `name` of the folders that are not in `seen` yet, links last."""
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    try:
        with os.scandir(folder) as found:
            entries = [(entry.is_symlink(), entry.name, _is_folder(entry)) for entry in found]
    except OSError:  # not allowed, or no folder (any more)
        return
    for _, inner, is_folder in sorted(entries):
        if is_folder:
            yield from _find_files(folder / inner, name, seen)
        elif inner == name:
            yield folder / inner


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Tell whether an entry is a folder or a link to one; a link to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False
