"""The runs of a comparison as processes: one after the other, or in parallel."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from vlbench.config.schema import Recipe
from vlbench.distributed.machine_limits import count_cpu_cores
from vlbench.errors import EnvironmentFailure, UserError, escape_to_one_line
from vlbench.regular_files import open_regular
from vlbench.stop_signals import handle_stop_signals
from vlbench.text_files import append_text, split_lines

PR_SET_PDEATHSIG = 1  # option of prctl(2): the signal sent when the parent process dies
MAX_CPU_RUNS = 4  # parallel runs of jobs=auto on CPU: there may be no memory for more
LOG_TAIL_BYTES = 1 << 16  # at the end of a log, in which its last line is
POLL_SECONDS = 0.2  # between checks of the processes
STOPPED_EXIT_CODE = 130  # of a run that was interrupted and has saved
REFUSED_EXIT_CODE = 2  # of a run that was not started: the user's mistake


@dataclass(frozen=True)
class TrainingJob:
    """A run to train, or to ask: `fit` or `eval` with these words, in this folder."""

    title: str
    overrides: tuple[str, ...]
    """Words behind the verb."""
    folder: Path
    verb: str = "fit"

    @property
    def log_file(self) -> Path:
        """The file that gets stdout and stderr of the run."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def last_log_line(self) -> str:
        """The last line of the log, without the prefix `vlbench: `."""
        with open_regular(self.log_file) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            lines = split_lines(file.read(LOG_TAIL_BYTES).decode("utf-8", "replace").strip())
        return lines[-1].removeprefix("vlbench: ") if lines else "no output"


class ComparisonStopped(Exception):
    """The comparison got SIGINT, SIGTERM or SIGHUP; its runs have saved."""


def count_run_gpus(recipes: Sequence[Recipe]) -> int:
    """Return how many GPUs a run takes: as many as the largest has devices.

    `recipes` are those of the runs to train; runs that are asked their tasks take one.
    """
    settings = [recipe.trainer for recipe in recipes if recipe.trainer.accelerator != "cpu"]
    return max((one.devices for one in settings), default=1)


def count_slots(jobs_option: str, run_gpus: int = 1) -> int:
    """Return how many runs are trained in parallel: the given number, or for `auto` by the GPUs.

    That is one for every `run_gpus` GPUs, which a run takes. Without a GPU it is one per core, at
    most `MAX_CPU_RUNS`: models trained on a CPU are so small that two runs of one thread each end
    sooner than two runs of two threads in sequence (by a fifth, on two cores).
    """
    if jobs_option != "auto":
        return int(jobs_option)
    gpus = torch.cuda.device_count()
    return max(1, gpus // run_gpus) if gpus else min(MAX_CPU_RUNS, count_cpu_cores())


def train_jobs(
    jobs: Sequence[TrainingJob],
    slot_count: int,
    is_ready: Callable[[TrainingJob], bool],
    on_start: Callable[[TrainingJob], None],
    on_end: Callable[[TrainingJob, int], None],
    run_gpus: int = 1,
) -> None:
    """Train jobs in parallel, in their order as far as they are ready.

    Args:
        jobs: the runs to train.
        slot_count: how many are trained in parallel.
        is_ready: whether a job may start now.
        on_start: called before a job starts. A UserError, EnvironmentFailure or OSError of
            it is the job's own: it stands in the log and the job ends with `REFUSED_EXIT_CODE`.
        on_end: called with the exit code after a job has ended.
        run_gpus: how many GPUs a run takes, if this machine has some.

    Raises:
        ComparisonStopped: this process got SIGINT, SIGTERM or SIGHUP; every run has saved by then.
    """
    waiting, free_slots = list(jobs), list(range(slot_count))
    running: dict[int, tuple[TrainingJob, subprocess.Popen[bytes]]] = {}
    with _collect_stop_signals() as stop_signals:
        while waiting or running:
            for job in [job for job in waiting if is_ready(job)][: len(free_slots)]:
                waiting.remove(job)
                try:
                    on_start(job)
                except (UserError, EnvironmentFailure, OSError) as error:
                    _write_log_line(job, str(error))
                    on_end(job, REFUSED_EXIT_CODE)
                    continue
                slot = free_slots.pop(0)
                running[slot] = job, _launch_job(job, slot_environment(slot, slot_count, run_gpus))
            time.sleep(POLL_SECONDS)
            if stop_signals:
                _forward_signals(stop_signals, [process for _, process in running.values()])
                raise ComparisonStopped
            for slot, (job, process) in list(running.items()):
                exit_code = process.poll()
                if exit_code is not None:
                    del running[slot]
                    free_slots.append(slot)
                    on_end(job, exit_code)


def _forward_signals(stop_signals: list[int], processes: list[subprocess.Popen[bytes]]) -> None:
    """Send the collected signals, and any that arrive meanwhile, until all processes have ended."""
    sent = 0
    while any(process.poll() is None for process in processes):
        for number in stop_signals[sent:]:
            for process in processes:
                process.send_signal(number)
            sent += 1
        time.sleep(POLL_SECONDS)


def _write_log_line(job: TrainingJob, text: str) -> None:
    """Append a line to the log of a job, as its own process would tell a mistake."""
    job.log_file.parent.mkdir(parents=True, exist_ok=True)
    with append_text(job.log_file) as file:
        file.write(f"vlbench: {escape_to_one_line(text)}\n")


def _launch_job(job: TrainingJob, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a run in a new process whose output is appended to its log."""
    job.log_file.parent.mkdir(parents=True, exist_ok=True)
    with append_text(job.log_file) as file:
        return subprocess.Popen(
            [sys.executable, "-m", "vlbench", job.verb, *job.overrides],
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,  # Ctrl-C is forwarded once; a second one would kill the run
            preexec_fn=_end_with_parent,
        )


def slot_environment(slot: int, slot_count: int, run_gpus: int = 1) -> dict[str, str]:
    """Return the environment that gives the run in a slot its own GPUs, or its share of cores."""
    gpus = torch.cuda.device_count()
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        first = slot % max(1, gpus // run_gpus) * run_gpus
        own = visible[:gpus][first : first + run_gpus]
        return {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(own)}
    threads = max(1, count_cpu_cores() // slot_count)
    return {"OMP_NUM_THREADS": str(threads), **os.environ}


def _end_with_parent() -> None:
    """Let Linux send this process SIGTERM when its parent is killed, so that it can save."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def _collect_stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP in a list while the context is active."""
    received: list[int] = []
    restore_handlers = handle_stop_signals(lambda number, _: received.append(number))
    try:
        yield received
    finally:
        restore_handlers()
