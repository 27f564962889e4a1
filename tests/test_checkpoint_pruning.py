"""Which checkpoints stay, and how others are removed: beside readers, and by what is killed."""

from __future__ import annotations

import errno
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from vlbench.train import callbacks, checkpoint_files
from vlbench.train.checkpoint_files import RunPosition, list_positions

prune = getattr(callbacks, "checkpoint_pruning", checkpoint_files).prune_checkpoints


def make_checkpoints(folder: Path, losses: list[float | None]) -> None:
    """Make checkpoints of steps 1, 2, ... with these held-out losses."""
    for step, loss in enumerate(losses, 1):
        position = RunPosition(0, "chat", step, loss)
        path = folder / position.folder_name
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"weights")
        (path / "position.json").write_text(json.dumps(vars(position)))


def steps_in(folder: Path) -> list[int]:
    return [position.step for position in list_positions(folder)]


def test_a_checkpoint_that_somebody_reads_does_not_end_the_training(tmp_path, monkeypatch, capsys):
    make_checkpoints(tmp_path, [None] * 3)

    def remove_on_nfs(path: Path, ignore_errors: bool = False, **_: Any) -> None:
        """Keep a file that is open, under another name, and so its folder."""
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        (path / "model.safetensors").rename(path / ".nfs0001")
        (path / "position.json").unlink()

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", remove_on_nfs)
        prune(tmp_path, 1)
    assert steps_in(tmp_path) == [3]
    assert capsys.readouterr().out.count("is in use") == 2
    callbacks.checkpoint_pruning.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["0-chat-000003"]


def test_a_checkpoint_whose_removal_was_killed_does_not_count(tmp_path, monkeypatch):
    make_checkpoints(tmp_path, [None] * 2)

    def remove_half(path: Path, **_: Any) -> None:
        (path / "model.safetensors").unlink()
        raise SystemExit

    monkeypatch.setattr(shutil, "rmtree", remove_half)
    with pytest.raises(SystemExit):
        prune(tmp_path, 1)
    assert steps_in(tmp_path) == [2]


def test_the_best_checkpoint_is_one_with_a_finite_loss(tmp_path):
    make_checkpoints(tmp_path, [math.nan, 1.0, 2.0, 3.0])
    prune(tmp_path, 1)
    assert steps_in(tmp_path) == [2, 4]
