"""Full disks and closed streams: one line with an exit code, and no half-written result."""

from __future__ import annotations

import errno
import os
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accidental_runs import FIT, files_of, newest_weights, print_into
from forked_command import run_command

from vlbench import file_lock
from vlbench.file_lock import LOCK_FILE
from vlbench.system_errors import explain_system_error
from vlbench.text_files import write_atomically

FILE_BYTES = 3_000_000  # a checkpoint of the second stage's first file does not fit


def limit(kind: int, most: int) -> Callable[[], None]:
    """Return what sets a limit of the process, as ulimit does."""
    return lambda: resource.setrlimit(kind, (most, most))


def write_to_full_device(*descriptors: int) -> Callable[[], None]:
    def prepare() -> None:
        full = os.open("/dev/full", os.O_WRONLY)
        for descriptor in descriptors:
            os.dup2(full, descriptor)

    return prepare


@pytest.mark.parametrize(("most_bytes", "where"), [(1000, "run"), (FILE_BYTES, "run/checkpoints")])
def test_a_full_disk_ends_fit_with_one_line_and_the_run_goes_on(
    most_bytes: int, where: str, whole_run: Path, tmp_path: Path
) -> None:
    def prepare() -> None:
        limit(resource.RLIMIT_FSIZE, most_bytes)()

    outcome = run_command([*FIT, "run=run"], tmp_path, prepare=prepare)
    assert f": cannot write in {where}" in outcome.assert_one_line(code=1)
    left = files_of(tmp_path)
    assert not any(".writing-" in name or name.endswith(LOCK_FILE) for name in left)
    assert run_command([*FIT, "run=run"], tmp_path, timeout=60).code == 0
    ours, theirs = newest_weights(tmp_path / "run"), newest_weights(whole_run)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["check", "recipe=yivl_llava", "out=new"], "new/findings.jsonl"),
        (["report", "{run}", "out=new.html"], ""),
        (["export", "model={run}", "out=new", "format=vlbench"], ""),
        (["eval", "model={run}", "out=new"], "new/settings.json"),
    ],
)
def test_a_full_disk_leaves_no_half_written_result(
    words: list[str], kept: str, whole_run: Path, tmp_path: Path
) -> None:
    before = files_of(whole_run)
    given = [word.format(run=whole_run) for word in words]
    prepare = limit(resource.RLIMIT_FSIZE, 250)
    line = run_command(given, tmp_path, prepare=prepare).assert_one_line(code=1)
    assert "new" in line and ("ulimit -f" in line or "File too large" in line)
    left = {name for name in files_of(tmp_path) if not name.endswith("answers.jsonl")}
    assert left <= {kept, "new/skipped.jsonl"} and files_of(whole_run) == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_file_is_replaced_whole_or_not_at_all(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "results.json"
    write_atomically(file, "old")

    def fail(self: Path, *_: object, **__: object) -> None:
        self.write_bytes(b"ne")
        raise OSError(number, os.strerror(number))  # as write(2) fails: it names no file

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="results.json") as failed:
        write_atomically(file, "new")
    assert file.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == [file.name]
    assert "results.json" in str(explain_system_error(failed.value))


def test_a_device_is_not_replaced_by_a_file() -> None:
    with pytest.raises(OSError, match="is a device"):
        write_atomically(Path("/dev/full"), "text")
    assert not Path("/dev/full").is_file()


def test_output_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    outcome = run_command(["list"], tmp_path, prepare=write_to_full_device(1))
    assert "standard output cannot be written (No space left" in outcome.assert_one_line(code=1)
    outcome = run_command(["fit", "--help"], tmp_path, prepare=write_to_full_device(1))  # >8 KiB
    assert "standard output cannot be written (No space left" in outcome.assert_one_line(code=1)
    outcome = run_command([*FIT, "run=run"], tmp_path, prepare=write_to_full_device(1))
    assert "standard output cannot be written" in outcome.assert_one_line(code=1)
    assert not (tmp_path / "run" / LOCK_FILE).exists()
    outcome = run_command(["list"], tmp_path, prepare=write_to_full_device(1, 2))
    assert outcome.code == 1 and not outcome.words
    outcome = run_command(["nonsense"], tmp_path, prepare=write_to_full_device(2))
    assert outcome.code == 2 and not outcome.words


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_may_be_closed(closed: str, tmp_path: Path) -> None:
    """No file that is opened later gets the number of a stream, and with it what others print."""
    code = "import os, sys\nfrom vlbench.__main__ import main\nmain(['list'])\n"
    code += "sys.exit(os.open('f', os.O_CREAT) < 3)"
    words = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(Path(file_lock.__file__).parents[1])}
    command = f"{shlex.join(words)} {closed}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0


def test_a_closed_pipe_ends_quietly(tmp_path: Path) -> None:
    def close_reader() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        print_into(writer, "stdout")

    outcome = run_command(["list"], tmp_path, prepare=close_reader)
    assert outcome.code == 1 and not outcome.words
