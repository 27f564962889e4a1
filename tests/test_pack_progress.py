"""A `pack` that is stopped goes on, and writes what it would have written at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from forked_command import run_command
from PIL import Image

from vlbench.__main__ import main
from vlbench.data import pack_progress, write_shards
from vlbench.data.shards import WebDatasetShards

RECORDS = 23


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    records = []
    for number in range(RECORDS):
        Image.new("RGB", (4, 4), (number, 9, 9)).save(f"{number}.png")
        name = "gone.png" if number in (2, 11, 22) else f"{number}.png"
        turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": f"{number}"}]
        records.append({"id": f"r{number}", "image": name, "conversations": turns})
    Path("data.json").write_text(json.dumps(records))
    assert main(["pack", "data=data.json", "out=whole", "samples=4"]) == 0
    return tmp_path


def stop_in_shard(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let a `pack` stop while it writes shard `number`."""
    write_tar = write_shards._write_tar

    def write(tar: Path, *arguments: object) -> tuple[int, int]:
        if tar.name == f"{number:06d}.tar":
            tar.write_bytes(b"half")
            raise KeyboardInterrupt
        return write_tar(tar, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(write_shards, "_write_tar", write)


def assert_whole(folder: Path) -> None:
    whole, ours = folder / "whole", folder / "shards"
    names = sorted(file.name for file in whole.iterdir())
    assert names == sorted(file.name for file in ours.iterdir())
    for name in names:
        assert (whole / name).read_bytes() == (ours / name).read_bytes(), name
    assert not list(folder.glob(".writing-*"))


WORDS = ["pack", "data=data.json", "out=shards", "samples=4"]


@pytest.mark.parametrize("number", [1, 3])
def test_a_pack_that_is_stopped_goes_on(folder, monkeypatch, capsys, number):
    with monkeypatch.context() as patched:
        stop_in_shard(patched, number)
        assert main(WORDS) == 130
    assert not Path("shards").exists() and Path(".writing-shards").is_dir()
    capsys.readouterr()
    assert main(WORDS) == 0
    told = capsys.readouterr().out
    assert f"going on after {number} shards, at record" in told
    assert "20 samples in 5 shards" in told and "3 left out" in told and "sample r2: " in told
    assert_whole(folder)


def test_a_pack_that_is_stopped_while_it_reads_how_far_it_is_goes_on(folder, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        stop_in_shard(patched, 2)
        assert main(WORDS) == 130
    with monkeypatch.context() as patched:
        patched.setattr(pack_progress, "write_atomically", lambda *_: signal.raise_signal(2))
        assert main(WORDS) == 130
    assert main(WORDS) == 0 and "going on after 2 shards" in capsys.readouterr().out
    assert_whole(folder)


def test_a_pack_that_is_killed_goes_on(folder):
    def prepare() -> None:
        write_tar = write_shards._write_tar

        def write(tar: Path, *arguments: object) -> tuple[int, int]:
            if tar.name == "000002.tar":
                os.kill(os.getpid(), signal.SIGKILL)
            return write_tar(tar, *arguments)  # type: ignore[arg-type]

        write_shards._write_tar = write

    outcome = run_command(WORDS, folder, prepare=prepare)
    assert outcome.code == -signal.SIGKILL and not outcome.killed
    assert len(list(Path(".writing-shards").glob("*.index"))) == 2
    assert main(WORDS) == 0
    assert_whole(folder)


def test_shards_of_other_data_or_settings_are_not_gone_on_with(folder, monkeypatch, capsys):
    for words in ([*WORDS[:3], "samples=5"], WORDS):
        with monkeypatch.context() as patched:
            stop_in_shard(patched, 2)
            assert main(WORDS) == 130
        if words == WORDS:  # the file is written again
            os.utime("data.json", (1, 1))
        capsys.readouterr()
        assert main(words) == 0
        assert "going on" not in capsys.readouterr().out
        assert len(WebDatasetShards("shards")) == 20
        shutil.rmtree("shards")


def test_a_damaged_shard_is_written_again(folder, monkeypatch):
    with monkeypatch.context() as patched:
        stop_in_shard(patched, 3)
        assert main(WORDS) == 130
    os.truncate(".writing-shards/000001.tar", 100)
    assert main(WORDS) == 0
    assert_whole(folder)
