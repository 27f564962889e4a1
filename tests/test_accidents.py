"""Accidents: a second process, a full disk, a closed terminal, too little memory, odd names.

Each has an exit code and one line, in little time and memory, and nothing that was there is lost.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pty
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from forked_command import Outcome, run_command, run_forked
from PIL import Image
from safetensors.torch import load_file

from vlbench import file_lock
from vlbench.__main__ import main
from vlbench.compare.experiment.run_jobs import TrainingJob, write_slurm_script
from vlbench.errors import EnvironmentFailure, UserError
from vlbench.file_lock import LOCK_FILE, STALE_MINUTES, LockHolder, current_holder, hold_lock
from vlbench.system_errors import explain_system_error
from vlbench.text_files import write_atomically
from vlbench.train import checkpoint_files, progress_logging
from vlbench.train.callbacks import GracefulStop
from vlbench.train.run_folder import RunFolder

QUICK = [
    "only=align_224",
    "stages.align_224.steps=4",
    "stages.align_224.global_batch_size=2",
    "log.questions=1",
    "log.examples=0",
    "log.tensorboard=false",
    "log.every_n_steps=1",
]
FIT = ["fit", "recipe=yivl_llava", *QUICK]
ODD_NAME = "a b;$(touch x)'\"\u00e9"
FILE_BYTES = 3_000_000  # a checkpoint of the second stage's first file does not fit


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("accidents")
    outcome = run_command([*FIT, "run=whole"], folder, timeout=60)
    assert outcome.code == 0, outcome.words
    return folder / "whole"


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def newest_weights(run: Path) -> dict[str, torch.Tensor]:
    position = RunFolder(run).latest_position
    assert position is not None
    return load_file(run / "checkpoints" / position.folder_name / "model.safetensors")


def limit(kind: int, most: int) -> Callable[[], None]:
    """Return what sets a limit of the process, as ulimit does."""
    return lambda: resource.setrlimit(kind, (most, most))


def write_to_full_device(*descriptors: int) -> Callable[[], None]:
    def prepare() -> None:
        full = os.open("/dev/full", os.O_WRONLY)
        for descriptor in descriptors:
            os.dup2(full, descriptor)

    return prepare


def print_into(descriptor: int, *streams: str) -> None:
    """Let streams of this process write into a pipe or a terminal."""
    for name in streams:
        number = {"stdout": 1, "stderr": 2}[name]
        os.dup2(descriptor, number)
        setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))


def call_at_step(number: int, call: Callable[[], object]) -> Callable[[], None]:
    """Return what patches training so that `call` is made within optimizer step `number`."""

    def prepare() -> None:
        real = progress_logging.ProgressCallback.on_step_end
        steps: list[int] = []

        def on_step_end(self, training, step) -> None:
            steps.append(1)
            if len(steps) == number:
                call()
            real(self, training, step)

        progress_logging.ProgressCallback.on_step_end = on_step_end  # type: ignore[method-assign]

    return prepare


def write_holder(folder: Path, **changes: object) -> LockHolder:
    """Write the lock of another process into a folder."""
    holder = replace(current_holder(), **changes)  # type: ignore[arg-type]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOCK_FILE).write_text(json.dumps(asdict(holder)))
    return holder


def write_data(folder: Path) -> None:
    """Write a data set of one sample."""
    Image.new("RGB", (30, 30), "red").save(folder / "red.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    record = {"id": "1", "image": "red.png", "conversations": turns}
    (folder / "data.json").write_text(json.dumps([record]))


# Two processes in one folder


def test_a_second_process_is_refused_and_the_first_ends_as_if_alone(
    whole: Path, tmp_path: Path
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
    ours, theirs = newest_weights(tmp_path / "run"), newest_weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("verb", ["fit", "compare", "eval", "pack"])
def test_who_writes_into_a_folder_that_is_in_use_is_refused(
    verb: str, whole: Path, tmp_path: Path
) -> None:
    held, words = tmp_path / "held", [*FIT, "run=held"]
    holder = write_holder(held, pid=os.getppid(), started="unknown")
    write_holder(held, pid=os.getppid(), started=file_lock._process_start(os.getppid()))
    lock_text = (held / LOCK_FILE).read_text()
    if verb == "compare":
        words = ["compare", "recipe=yivl_llava", "seeds=1", "run=held", *QUICK]
    if verb == "eval":
        words = ["eval", f"model={whole}", "out=held"]
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


# Full disks and lost output


@pytest.mark.parametrize(("most_bytes", "where"), [(1000, "run"), (FILE_BYTES, "run/checkpoints")])
def test_a_full_disk_ends_fit_with_one_line_and_the_run_goes_on(
    most_bytes: int, where: str, whole: Path, tmp_path: Path
) -> None:
    def prepare() -> None:
        limit(resource.RLIMIT_FSIZE, most_bytes)()

    outcome = run_command([*FIT, "run=run"], tmp_path, prepare=prepare)
    assert f": cannot write in {where}" in outcome.assert_one_line(code=1)
    left = files_of(tmp_path)
    assert not any(".writing-" in name or name.endswith(LOCK_FILE) for name in left)
    assert run_command([*FIT, "run=run"], tmp_path, timeout=60).code == 0
    ours, theirs = newest_weights(tmp_path / "run"), newest_weights(whole)
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
    words: list[str], kept: str, whole: Path, tmp_path: Path
) -> None:
    before = files_of(whole)
    given = [word.format(run=whole) for word in words]
    prepare = limit(resource.RLIMIT_FSIZE, 250)
    line = run_command(given, tmp_path, prepare=prepare).assert_one_line(code=1)
    assert "new" in line and ("ulimit -f" in line or "File too large" in line)
    left = {name for name, data in files_of(tmp_path).items() if not name.endswith("answers.jsonl")}
    assert left <= {kept, "new/skipped.jsonl"} and files_of(whole) == before


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


# Signals, threads, memory


def test_a_hang_up_saves_and_the_run_goes_on(whole: Path, tmp_path: Path) -> None:
    prepare = call_at_step(3, lambda: os.kill(os.getpid(), signal.SIGHUP))
    stopped = run_command([*FIT, f"run={ODD_NAME}"], tmp_path, prepare=prepare)
    assert stopped.code == 130, stopped.words
    line = stopped.stderr.strip()
    assert line.startswith("stopped by SIGHUP, saved. To go on: repeat the command with ")
    run = tmp_path / ODD_NAME
    assert shlex.split(line.partition(" with ")[2]) == [f"run={ODD_NAME}"]
    assert not (run / LOCK_FILE).exists() and not (run / "results.json").exists()
    finished = run_command([*FIT, f"run={ODD_NAME}"], tmp_path, timeout=60)
    assert finished.code == 0 and not (tmp_path / "x").exists()
    ours, theirs = newest_weights(run), newest_weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    line = next(text for text in finished.stdout.splitlines() if " vlbench chat " in text)
    assert shlex.split(line, comments=True)[-1] == f"model={ODD_NAME}"


def test_nohup_goes_on(tmp_path: Path) -> None:
    def prepare() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        call_at_step(2, lambda: os.kill(os.getpid(), signal.SIGHUP))()

    outcome = run_command([*FIT, "run=run"], tmp_path, timeout=60, prepare=prepare)
    assert outcome.code == 0 and "stopped" not in outcome.words


def test_a_terminal_that_closes_saves(tmp_path: Path) -> None:
    """Its streams are errors from then on, before the checkpoint is written."""

    def prepare() -> None:
        master, slave = pty.openpty()
        print_into(slave, "stdout", "stderr")
        os.close(slave)

        def hang_up() -> None:
            os.close(master)
            os.kill(os.getpid(), signal.SIGHUP)

        call_at_step(3, hang_up)()

    outcome = run_command([*FIT, "run=run"], tmp_path, prepare=prepare)
    assert outcome.code == 130 and not outcome.killed
    assert checkpoint_files.list_positions(tmp_path / "run/checkpoints")[-1].step == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_elsewhere_removes_what_is_half_written(number: int, tmp_path: Path) -> None:
    write_data(tmp_path)

    def prepare() -> None:
        from vlbench.data import write_shards

        def stop(*_: object) -> None:
            assert list(tmp_path.glob(".writing-*"))
            os.kill(os.getpid(), number)
            time.sleep(10)

        write_shards._write_all_shards = stop

    words = ["pack", "data=data.json", "images=.", "out=shards"]
    outcome = run_command(words, tmp_path, prepare=prepare)
    assert outcome.code == -number and not outcome.words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "red.png"]


def test_fit_in_a_thread_trains(tmp_path: Path) -> None:
    def in_thread() -> int:
        codes: list[int] = []
        thread = threading.Thread(target=lambda: codes.append(main([*FIT, "run=run"])))
        thread.start()
        thread.join()
        return codes[0] if codes else 99

    outcome = run_forked(in_thread, tmp_path, timeout=60)
    assert outcome.code == 0, outcome.words
    assert (tmp_path / "run/results.json").is_file()


def test_a_stop_in_a_thread_changes_no_handler() -> None:
    before = signal.getsignal(signal.SIGHUP)
    seen: list[object] = []

    def stop() -> None:
        with GracefulStop() as graceful_stop:
            seen.append((graceful_stop.is_stop_requested(), signal.getsignal(signal.SIGHUP)))

    thread = threading.Thread(target=stop)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


LIMITED_FIT = """
import os, resource, sys
from pathlib import Path
from forked_command import import_heavy_modules
from vlbench.__main__ import main

import_heavy_modules()
pages = int(Path("/proc/self/statm").read_text().split()[0])
most = pages * os.sysconf("SC_PAGE_SIZE") + 30_000_000
resource.setrlimit(resource.RLIMIT_AS, (most, most))
sys.exit(main(sys.argv[1:]))
"""


def test_a_small_limit_of_memory_is_one_line(tmp_path: Path) -> None:
    """In a process of its own: the heap of this one may hold enough free memory to train."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED_FIT, *FIT, "run=run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    lines = ended.stderr.splitlines()
    assert ended.returncode == 1 and len(lines) == 1, ended.stderr
    assert lines[0].startswith("vlbench: ") and "memory" in lines[0]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "out of memory"),
        (MemoryError("std::bad_alloc"), "ulimit -v"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 80 bytes"), "out of memory"),
        (ImportError("libx.so: failed to map segment from shared object"), "out of memory"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "ulimit -u"),
        (OSError(errno.EMFILE, "Too many open files", "f"), "ulimit -n"),
    ],
)
def test_what_the_machine_lacks_is_one_line_with_code_1(error: Exception, words: str) -> None:
    explained = explain_system_error(error)
    assert isinstance(explained, EnvironmentFailure)
    assert words in str(explained) and "\n" not in str(explained)


def test_a_fault_of_the_program_is_not_explained_away() -> None:
    for error in (ValueError("x"), RuntimeError("shapes differ"), KeyError("k"), ImportError("no")):
        assert explain_system_error(error) is None


# Folders and names


def test_the_current_folder_is_gone(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    words = [*FIT, "run=run"]
    line = run_command(words, gone, prepare=gone.rmdir).assert_one_line()
    assert "current folder is gone" in line


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("file", "run=file is not a folder"),
        ("file/run", "run=file/run is not a folder"),
        ("x" * 300, "File name too long"),
        ("a\nb", "no name may have control characters"),
        ("/proc/run", "/proc/run"),
        ("others", "is a folder with other things in it"),
    ],
)
def test_a_folder_that_cannot_be_a_run(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "others").mkdir()
    (tmp_path / "others/mine.txt").write_text("mine")
    before = files_of(tmp_path)
    line = run_command([*FIT, f"run={name}"], tmp_path).assert_one_line()
    assert words in line and files_of(tmp_path) == before


def test_no_home_and_a_missing_temporary_folder_do_not_matter(whole: Path, tmp_path: Path) -> None:
    environment = {"HOME": "/nonexistent", "TMPDIR": "/nonexistent", "LC_ALL": "C"}
    words = ["report", str(whole), "out=r.md"]
    outcome = run_command(words, tmp_path, environment=environment)
    assert outcome.code == 0 and (tmp_path / "r.md").is_file(), outcome.words


def test_a_run_that_was_killed_while_it_began_can_be_begun_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for name in ("versions.json", ".recipe.yaml.77", ".lock", ".lock.abc"):
        (tmp_path / name).write_text("{}")
    run.checkpoints_folder.mkdir()
    assert run.is_described_only
    (run.checkpoints_folder / "somebody.ckpt").write_text("")
    assert not run.is_described_only
    (run.checkpoints_folder / "somebody.ckpt").unlink()
    (tmp_path / ".git").mkdir()
    assert not run.is_described_only


def test_scripts_for_slurm_survive_every_name(tmp_path: Path) -> None:
    folder = tmp_path / (ODD_NAME + "%j")
    folder.mkdir()
    words = ("recipe=yivl_llava", f"run={folder / 'seed 0'}", "x=$HOME `id`")
    script = write_slurm_script([TrainingJob("t", words, folder / "seed 0")], folder)
    assert shlex.split((folder / "commands.txt").read_text())[4:] == list(words)
    headers = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    options = dict(
        word.split("=", 1) for line in headers for word in shlex.split(line)[1:] if "=" in word
    )
    assert options["--output"] == f"{str(folder).replace('%', '%%')}/slurm-%a.log"
    seen = subprocess.run(
        ["bash", "-c", f"exec() {{ printf '%s\\0' \"$@\"; }}; . {shlex.quote(str(script))}"],
        env={**os.environ, "SLURM_ARRAY_TASK_ID": "1"},
        cwd=tmp_path,
        capture_output=True,
        check=True,
    ).stdout
    assert seen.decode().split("\0")[4:-1] == list(words) and not (tmp_path / "x").exists()


def test_a_control_character_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="control characters"):
        with file_lock.hold_folder(tmp_path / "a\x1b[2Jb", "run=x"):
            pass
    assert list(tmp_path.iterdir()) == []
