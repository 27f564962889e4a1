"""Which checkpoints of a run stay, and how the others are removed while somebody may read them."""

from __future__ import annotations

import math
import shutil
import uuid
from operator import itemgetter
from pathlib import Path

from vlbench.train import checkpoint_files

REMOVED_PREFIX = ".removed-"  # of folders that are being removed


def prune_checkpoints(folder: Path, keep_last_checkpoints: int) -> None:
    """Remove all but the last `keep_last_checkpoints` and the best of the newest stage.

    The best has the lowest held-out loss. The newest checkpoint of an earlier stage stays, without
    its optimizer. What cannot be removed, as somebody reads it, does not end a training.
    """
    positions = checkpoint_files.list_positions(folder)
    if not positions:
        return
    open_stage = positions[-1].stage
    newest = {position.stage: position for position in positions}
    kept = [*positions[-keep_last_checkpoints:], *newest.values()]
    finite = [  # where NaN came first, no loss would be less
        (position.loss, position)
        for position in positions
        if position.stage == open_stage
        and position.loss is not None
        and math.isfinite(position.loss)
    ]
    if finite:
        kept.append(min(finite, key=itemgetter(0))[1])
    kept_names = {position.folder_name for position in kept}
    for position in positions:
        path = folder / position.folder_name
        if position.folder_name not in kept_names:
            _remove_folder(path, folder)
        elif position.stage < open_stage and (path / checkpoint_files.OPTIMIZER_FOLDER).exists():
            _remove_folder(path / checkpoint_files.OPTIMIZER_FOLDER, folder)


def _remove_folder(path: Path, checkpoints_folder: Path) -> None:
    """Remove a folder at once: it is renamed first, so that none is ever seen half removed.

    NFS keeps files that another process has opened, as one that evaluates a checkpoint, and so
    their folder. That is told, and `remove_leftovers` removes it when the run goes on.
    """
    removed = checkpoints_folder / f"{REMOVED_PREFIX}{uuid.uuid4().hex}"
    path.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)
    if removed.exists():
        print(f"{path} is in use: what is left of it is in {removed}", flush=True)


def remove_leftovers(checkpoints_folder: Path) -> None:
    """Remove checkpoints that were not written to their end, and what is left of removed ones."""
    for unfinished in checkpoints_folder.glob(f"{checkpoint_files.WRITING_PREFIX}*"):
        shutil.rmtree(unfinished)
    for removed in checkpoints_folder.glob(f"{REMOVED_PREFIX}*"):
        shutil.rmtree(removed, ignore_errors=True)
