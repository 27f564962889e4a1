"""The runs of a comparison as processes: one after the other, several at once, or for Slurm."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from vlbench.distributed.machine_limits import count_cpu_cores
from vlbench.text_files import split_lines, write_atomically

PR_SET_PDEATHSIG = 1  # of Linux' prctl
MAX_CPU_RUNS = 4  # runs at once that nobody asked for: memory for more may be missing
POLL_SECONDS = 0.2  # seconds between looks at the processes
STOPPED_EXIT_CODE = 130  # exit code of a run that was stopped and has saved


@dataclass(frozen=True)
class TrainingJob:
    """One run that is to be trained."""

    title: str
    overrides: tuple[str, ...]
    """Of `fit`."""
    folder: Path

    @property
    def log_file(self) -> Path:
        """Where its output goes."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def last_log_line(self) -> str:
        """The last thing that it said."""
        lines = split_lines(self.log_file.read_text(encoding="utf-8", errors="replace").strip())
        return lines[-1].removeprefix("vlbench: ") if lines else "no output"


class ComparisonStopped(Exception):
    """Somebody wants the comparison to stop; the runs have saved."""


def count_slots(jobs_option: str) -> int:
    """Return how many runs are trained at once: a number, or for `auto` one per GPU.

    Without a GPU that is one per processor, MOST at most: a model that is trained there is so small
    that two runs of one thread end sooner than two of two threads one after the other (by a fifth,
    on two cores).
    """
    if jobs_option != "auto":
        return int(jobs_option)
    return torch.cuda.device_count() or min(MAX_CPU_RUNS, count_cpu_cores())


def train_jobs(
    jobs: Sequence[TrainingJob],
    slot_count: int,
    is_ready: Callable[[TrainingJob], bool],
    on_start: Callable[[TrainingJob], None],
    on_end: Callable[[TrainingJob, int], None],
) -> None:
    """Train jobs, `count` at once, in their order as far as they are `ready`.

    `start` is called before a job, `end` after it with its exit code. Raises Stopped when this
    process is told to stop; every run has saved by then.
    """
    waiting, free = list(jobs), list(range(slot_count))
    running: dict[int, tuple[TrainingJob, subprocess.Popen]] = {}
    with _collect_stop_signals() as stop:
        while waiting or running:
            for job in [one for one in waiting if is_ready(one)][: len(free)] if free else []:
                waiting.remove(job)
                on_start(job)
                slot = free.pop(0)
                running[slot] = job, _launch_job(job, slot, slot_count)
            time.sleep(POLL_SECONDS)
            if stop:
                _forward_signals(stop, [process for _, process in running.values()])
                raise ComparisonStopped
            for slot, (job, process) in list(running.items()):
                code = process.poll()
                if code is not None:
                    del running[slot]
                    free.append(slot)
                    on_end(job, code)


def _forward_signals(stop_signals: list[int], processes: list[subprocess.Popen]) -> None:
    """Give the signals to stop to all processes, also those still to come, until all have ended."""
    passed = 0
    while any(process.poll() is None for process in processes):
        for number in stop_signals[passed:]:
            for process in processes:
                process.send_signal(number)
            passed += 1
        time.sleep(POLL_SECONDS)


def _launch_job(job: TrainingJob, slot: int, slot_count: int) -> subprocess.Popen:
    """Start a run in a process of its own, its output in its log."""
    job.log_file.parent.mkdir(parents=True, exist_ok=True)
    with job.log_file.open("a", encoding="utf-8") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "vlbench", "fit", *job.overrides],
            stdout=file,
            stderr=file,
            env=slot_environment(slot, slot_count),
            start_new_session=True,  # Ctrl-C comes from here, once: a second one would kill it
            preexec_fn=_end_with_parent,
        )


def slot_environment(slot: int, slot_count: int) -> dict[str, str]:
    """Return the variables that give one run of `count` its own GPU, or its processors."""
    gpus = torch.cuda.device_count()
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
        return {**os.environ, "CUDA_VISIBLE_DEVICES": visible.split(",")[slot % gpus]}
    threads = max(1, count_cpu_cores() // slot_count)
    return {"OMP_NUM_THREADS": str(threads), **os.environ}


def _end_with_parent() -> None:
    """Ask Linux to end this process, with time to save, when the one that started it is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def _collect_stop_signals() -> Iterator[list[int]]:
    """Collect the signals that ask to stop, instead of dying of them."""
    wanted: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.signal(n, lambda number, _: wanted.append(number)) for n in numbers}
    try:
        yield wanted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_slurm_script(jobs: Sequence[TrainingJob], folder: Path) -> Path:
    """Write `commands.txt` and a script that runs its lines as a Slurm array; return the script."""
    commands = folder / "commands.txt"
    lines = [shlex.join([sys.executable, "-m", "vlbench", "fit", *job.overrides]) for job in jobs]
    write_atomically(commands, "\n".join(lines) + "\n")
    script = folder / "array.sh"
    write_atomically(
        script,
        f"""#!/bin/bash
#SBATCH --job-name=vlbench-{folder.name}
#SBATCH --array=1-{len(jobs)}
#SBATCH --gpus=1
#SBATCH --output={folder}/slurm-%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
# One run per line of commands.txt. Runs that are stopped have saved; a second sbatch goes on.
cd {shlex.quote(str(Path.cwd()))} || exit 1
eval "exec $(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {shlex.quote(str(commands))})"
""",
    )
    return script
