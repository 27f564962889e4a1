"""Which files belong to the images of a data set: those inside of its folder, links followed.

A data set that was downloaded may name any file of this machine, by an absolute path, by `..` or
through a link, and training, caches and pages would carry it on. So a file outside of the folder is
read only where the user allows it, and is never shown on a page.
"""

from __future__ import annotations

import os
from pathlib import Path

HOW_TO_ALLOW = "data.allow_outside=true (in pack and eval: allow_outside=true) allows it"


def is_inside(path: str | Path, folder: str | Path) -> bool:
    """Tell whether a file, which need not exist, is in a folder, with all links followed.

    The hub's cache keeps the files of a snapshot as links to `blobs` of the same repository, which
    counts as inside.
    """
    real_path = os.path.realpath(path)
    return any(real_path.startswith(root) for root in _allowed_roots(str(folder)))


def page_refusal(image: object) -> str:
    """Return why a page must not show an image, "" where it may.

    A page is passed on, and an image from outside of the data set's folder may be private.
    """
    if not getattr(image, "is_outside", False):
        return ""
    name = getattr(image, "name", "")
    return f"image {name} is not shown: it lies outside of the images' folder"


def outside_message(folder: str) -> str:
    """Return what is wrong with a file that is not inside, as a clause without its name."""
    return f"lies outside of the images' folder {folder}; {HOW_TO_ALLOW}"


def missing_message(path: str | Path) -> str:
    """Return what is wrong with a file that is not there, as a clause without its name."""
    is_from_windows = "\\" in str(path)
    return "does not exist" + "; folders are separated by /, not by \\" * is_from_windows


def _allowed_roots(folder: str) -> tuple[str, ...]:
    """Return the folders in which images may lie, each with a separator at its end."""
    real_folder = Path(os.path.realpath(folder))
    roots = [real_folder]
    for snapshot in (real_folder, *real_folder.parents):
        if snapshot.parent.name == "snapshots":  # REPOSITORY/snapshots/COMMIT
            roots.append(snapshot.parent.parent / "blobs")
            break
    return tuple(os.path.join(root, "") for root in roots)
