"""Accidents: signals, a closed terminal, too little memory, odd names.

Each has an exit code and one line, in little time and memory, and nothing that was there is lost.
Two processes in one folder are in test_folder_locks.py, full disks in test_lost_output.py.
"""

from __future__ import annotations

import errno
import os
import pty
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accidental_runs import FIT, call_at_step, files_of, newest_weights, print_into, write_data
from forked_command import run_command, run_forked

from vlbench import file_lock
from vlbench.__main__ import main
from vlbench.compare.experiment import probe_run
from vlbench.compare.experiment.run_jobs import TrainingJob
from vlbench.compare.experiment.slurm_array import write_slurm_script
from vlbench.config import recipe as recipes
from vlbench.errors import EnvironmentFailure, UserError
from vlbench.file_lock import LOCK_FILE
from vlbench.system_errors import explain_system_error, is_memory_error
from vlbench.train import checkpoint_files, fit
from vlbench.train.callbacks import GracefulStop
from vlbench.train.lightning_trainer import explain_stage_errors
from vlbench.train.run_folder import RunFolder

ODD_NAME = "a b;$(touch x)'\"\u00e9"

# Signals, threads, memory


def test_a_hang_up_saves_and_the_run_goes_on(whole_run: Path, tmp_path: Path) -> None:
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
    ours, theirs = newest_weights(run), newest_weights(whole_run)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    line = next(text for text in finished.stdout.splitlines() if " vlbench chat " in text)
    assert shlex.split(line, comments=True)[-1] == f"model={ODD_NAME}"


def test_a_stop_while_the_model_is_loaded_is_one_before_the_first_step(tmp_path: Path) -> None:
    def prepare() -> None:
        real = fit.build_or_resume_model

        def load(*given: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return real(*given)

        fit.build_or_resume_model = load

    stopped = run_command([*FIT, "run=run"], tmp_path, prepare=prepare)
    assert stopped.code == 130, stopped.words
    assert stopped.stderr.strip().startswith("stopped by SIGTERM, before the first step. To go on:")
    assert not checkpoint_files.list_positions(tmp_path / "run/checkpoints")
    assert not (tmp_path / "run/metrics.csv").exists()
    finished = run_command([*FIT, "run=run"], tmp_path, timeout=60)
    assert finished.code == 0, finished.words


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
        (RuntimeError("can't start new thread"), "ulimit -v"),
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


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 "
            "GiB of which 1.00 GiB is free. Of the allocated memory 5.00 GiB is by PyTorch"
        ),
        torch.OutOfMemoryError("Allocation on device would exceed allowed memory."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("NCCL error: Last error:\nCuda failure 2 'out of memory'"),
    ],
)
def test_a_gpu_without_memory_is_one_line_that_says_what_helps_there(error: Exception) -> None:
    assert is_memory_error(error)
    line = str(explain_system_error(error))
    assert "out of memory on the GPU" in line and "batch=" in line and "dtype=" in line
    assert "ulimit" not in line and "\n" not in line and "by PyTorch" not in line
    stage = recipes.load_recipe(["recipe=yivl_llava"]).stages["chat"]
    with pytest.raises(EnvironmentFailure, match="out of memory in stage chat: lower stages.chat"):
        with explain_stage_errors("chat", stage):
            raise error


def test_a_probe_without_memory_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(probe_run, "measure_stages", run_out)
    assert probe_run.run_probe(["recipe=yivl_llava"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vlbench: out of memory on the GPU")


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


def test_no_home_and_a_missing_temporary_folder_do_not_matter(
    whole_run: Path, tmp_path: Path
) -> None:
    environment = {"HOME": "/nonexistent", "TMPDIR": "/nonexistent", "LC_ALL": "C"}
    words = ["report", str(whole_run), "out=r.md"]
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
