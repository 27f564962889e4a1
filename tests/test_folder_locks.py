"""Two processes in one folder: the second is refused, and nothing that was there is lost."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from accidental_runs import FIT, QUICK, call_at_step, files_of, newest_weights, write_data
from forked_command import Outcome, run_command

from vlbench import file_lock
from vlbench.__main__ import main
from vlbench.errors import EnvironmentFailure
from vlbench.file_lock import LOCK_FILE, STALE_MINUTES, LockHolder, current_holder, hold_lock
from vlbench.train.run_folder import RunFolder


def write_holder(folder: Path, **changes: object) -> LockHolder:
    """Write the lock of another process into a folder."""
    holder = replace(current_holder(), **changes)  # type: ignore[arg-type]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOCK_FILE).write_text(json.dumps(asdict(holder)))
    return holder


def test_a_second_process_is_refused_and_the_first_ends_as_if_alone(
    whole_run: Path, tmp_path: Path
) -> None:
    """The second is started in the middle of the first, twice: to go on, and by an eval."""
    said: list[Outcome] = []

    def start_another() -> None:
        before = files_of(tmp_path / "run")
        second = run_command([*FIT, "run=run"], tmp_path)
        assert files_of(tmp_path / "run") == before
        print(f"SECOND {second.code} {second.stderr.strip()}")

    said.append(
        run_command([*FIT, "run=run"], tmp_path, timeout=60, prepare=call_at_step(3, start_another))
    )
    assert said[0].code == 0, said[0].words
    line = next(text for text in said[0].stdout.splitlines() if text.startswith("SECOND"))
    assert line.startswith("SECOND 1 vlbench: run=run is in use by process ")
    assert "Traceback" not in said[0].words and not (tmp_path / "run" / LOCK_FILE).exists()
    ours, theirs = newest_weights(tmp_path / "run"), newest_weights(whole_run)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("verb", ["fit", "compare", "eval", "pack"])
def test_who_writes_into_a_folder_that_is_in_use_is_refused(
    verb: str, whole_run: Path, tmp_path: Path
) -> None:
    held, words = tmp_path / "held", [*FIT, "run=held"]
    holder = write_holder(held, pid=os.getppid(), started="unknown")
    write_holder(held, pid=os.getppid(), started=file_lock._process_start(os.getppid()))
    lock_text = (held / LOCK_FILE).read_text()
    if verb == "compare":
        words = ["compare", "recipe=yivl_llava", "seeds=1", "run=held", *QUICK]
    if verb == "eval":
        words = ["eval", f"model={whole_run}", "out=held"]
    if verb == "pack":
        write_data(tmp_path)
        shutil.rmtree(held)
        (tmp_path / ".writing-held.lock").write_text(lock_text)
        words = ["pack", "data=data.json", "images=.", "out=held"]
    before = files_of(tmp_path)
    line = run_command(words, tmp_path).assert_one_line(code=1)
    assert f"=held is in use by process {holder.pid} on {holder.host}" in line
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "silent_minutes", "is_taken_over"),
    [
        ({"pid": 2**22 + 1}, 0, True),  # no such process
        ({"started": "1"}, 0, True),  # the id was recycled
        ({}, 600, False),  # it lives: a machine may have slept
        ({"host": "elsewhere", "boot": "b"}, 0, False),
        ({"host": "elsewhere", "boot": "b"}, STALE_MINUTES + 1, True),
        ({"boot": "another container"}, 0, False),
        ({"host": "elsewhere", "boot": "b", "job": "7", "restarts": 0}, 0, True),  # queued again
        ({"host": "elsewhere", "boot": "b", "job": "8", "restarts": 0}, 0, False),
        ({"host": "elsewhere", "boot": "b", "job": "7", "restarts": 1}, 0, False),
        (None, 0, False),  # cut short
        (None, STALE_MINUTES + 1, True),
    ],
)
def test_a_lock_is_taken_over_from_a_process_that_has_ended(
    changes: dict[str, object] | None,
    silent_minutes: float,
    is_taken_over: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lock_file = tmp_path / LOCK_FILE
    write_holder(tmp_path, **(changes or {}))
    if changes is None:
        lock_file.write_text('{"host": "el')
    last_beat = time.time() - silent_minutes * 60
    os.utime(lock_file, (last_beat, last_beat))
    before = lock_file.read_text()
    if is_taken_over:
        with hold_lock(lock_file, "run=r"):
            assert json.loads(lock_file.read_text()) == asdict(current_holder())
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "run=r was left locked by " in said
        assert list(tmp_path.iterdir()) == []
        return
    with pytest.raises(EnvironmentFailure, match="run=r is in use by ") as refused:
        with hold_lock(lock_file, "run=r"):
            pass
    assert "\n" not in str(refused.value) and lock_file.read_text() == before
    if changes:
        assert str(lock_file) in str(refused.value)
    assert [file.name for file in tmp_path.iterdir()] == [LOCK_FILE]


def test_many_processes_that_see_a_stale_lock_hold_it_one_after_the_other(tmp_path: Path) -> None:
    """Every one writes its mark while it holds the lock; two marks at once would be seen."""
    lock_file, mark = tmp_path / LOCK_FILE, tmp_path / "mark"
    write_holder(tmp_path, pid=2**22 + 1)
    children = []
    for _ in range(8):
        child = os.fork()
        if not child:
            code = 1
            with contextlib.suppress(BaseException):
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                for _ in range(20):
                    with contextlib.suppress(EnvironmentFailure), hold_lock(lock_file, "run=r"):
                        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
                        time.sleep(0.001)
                        mark.unlink()
                code = 0
            os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
    assert list(tmp_path.iterdir()) == []


def test_a_lock_works_where_files_cannot_be_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with hold_lock(tmp_path / LOCK_FILE, "run=r"):
        with pytest.raises(EnvironmentFailure), hold_lock(tmp_path / LOCK_FILE, "run=r"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_the_holder_gives_heartbeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_lock, "HEARTBEAT_SECONDS", 0.01)
    lock_file = tmp_path / LOCK_FILE
    with hold_lock(lock_file, "run=r"):
        os.utime(lock_file, (1, 1))
        deadline = time.monotonic() + 20
        while lock_file.stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_runs_without_a_name_get_different_ones(tmp_path: Path) -> None:
    words = [word.replace("steps=4", "steps=0") for word in FIT]

    def begin_another() -> None:
        real = RunFolder.record_weight_origins

        def record(self, origins) -> None:
            RunFolder.record_weight_origins = real  # type: ignore[method-assign]
            assert main(words) == 0
            real(self, origins)

        RunFolder.record_weight_origins = record  # type: ignore[method-assign]

    assert run_command(words, tmp_path, timeout=60, prepare=begin_another).code == 0
    names = {f"yivl_llava-tiny-{number}" for number in (1, 2)}
    assert {path.name for path in (tmp_path / "runs").iterdir()} == names
    assert all((tmp_path / "runs" / name / "results.json").is_file() for name in names)
