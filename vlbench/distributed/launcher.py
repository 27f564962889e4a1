"""Several processes on this machine that train one model: started, watched, and ended together.

torchrun and Slurm start them as well (docs/cluster.md). This is for one machine and no launcher; it
imports no torch.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlbench.config.schema import TrainerConfig
from vlbench.distributed.machine_limits import count_cpu_cores
from vlbench.errors import UserError

LAUNCHER_PID_ENV = "VLBENCH_LAUNCHER"  # process id, told to the processes that it started
TORCHELASTIC_ENV = "TORCHELASTIC_RUN_ID"  # told by torchrun
GRACE_SECONDS = 20.0  # seconds for the others to end by themselves, once one has ended badly
POLL_SECONDS = 0.1  # seconds
ORPHAN_GRACE_SECONDS = 120.0  # seconds to end the step and save, when the launcher has died
PARENT_POLL_SECONDS = 1.0  # seconds between looks at the launcher
SLURM_EXIT_SECONDS = 10.0  # seconds in which other tasks of Slurm have ended
STARTUP_SECONDS = 2.0  # seconds in which Python starts, and training cannot have begun
INTERRUPTED_EXIT_CODE = 128 + signal.SIGINT  # exit code of what was asked to stop


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether this process is one of several that a launcher has started."""
    return "LOCAL_RANK" in environment or is_slurm_task(environment)


def is_slurm_task(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether srun has started this process, and others beside it."""
    return int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def exit_silently_on_ctrl_c() -> None:
    """Let Ctrl-C end this process without a word while it has nothing to save.

    The process that has started it hands Ctrl-C on, and tells of it once.
    """
    if LAUNCHER_PID_ENV in os.environ:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def report_error_once() -> Iterator[None]:
    """Let the first of several processes tell a mistake that all of them find."""
    try:
        yield
    except UserError:
        number = os.environ.get("SLURM_PROCID" if is_slurm_task() else "RANK", "0")
        if is_launched() and number != "0":
            raise SystemExit(silent_exit_code(2)) from None
        raise


def silent_exit_code(exit_code: int) -> int:
    """Return the exit code of a process that leaves it to another one to say why all leave.

    srun kills all others when a task leaves with a code that is not 0, also the one that still has
    something to say, and then tells the code of a killed one.
    """
    return 0 if is_slurm_task() else exit_code


def final_exit_code(exit_code: int) -> int:
    """Return the exit code of the process that speaks for all, when the others have left."""
    if exit_code and is_slurm_task():
        time.sleep(SLURM_EXIT_SECONDS)
    return exit_code


def is_launcher_gone() -> bool:
    """Tell whether the process that has started this one, and would end it, has died."""
    return LAUNCHER_PID_ENV in os.environ and os.getppid() != int(os.environ[LAUNCHER_PID_ENV])


def end_with_launcher() -> None:
    """Let this process stop and save when what started it has died, by kill -9 as well.

    A dead launcher hands nothing on. A process that does not stop, as it waits for another one, is
    killed after ORPHANED seconds.
    """
    if LAUNCHER_PID_ENV in os.environ or TORCHELASTIC_ENV in os.environ:
        started_by = int(os.environ.get(LAUNCHER_PID_ENV, os.getppid()))
        threading.Thread(target=_exit_after_launcher, args=(started_by,), daemon=True).start()


def _exit_after_launcher(launcher_pid: int) -> None:
    """Wait for the end of the launcher, then end this process."""
    while os.getppid() == launcher_pid:
        time.sleep(PARENT_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def isolate_data_worker(_: int) -> None:
    """Take a data worker out of the process group of its run, as DataLoader's `worker_init_fn`.

    What is sent to the group (Slurm before it preempts, Ctrl-C) is for the run, which stops after
    its step; workers would die of it in the middle of one. They end with their run, also when they
    are in the middle of a sample.
    """
    os.setpgrp()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait for the end of the process that made this one, then end it too."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def launch_processes(command_args: Sequence[str], settings: TrainerConfig) -> int:
    """Run `python -m vlbench WORDS` in as many processes as `settings` says; return the exit code.

    Ctrl-C and SIGTERM are handed on. When one process ends badly, or Ctrl-C comes twice, the others
    are given a little time, and are then ended too.
    """
    if settings.num_nodes > 1:
        raise UserError(
            f"trainer.num_nodes is {settings.num_nodes}: start the command on every machine with "
            f"srun (a task per GPU) or torchrun --nproc-per-node={settings.devices}; "
            "docs/cluster.md has both"
        )
    processes = _start_processes(command_args, settings.devices)
    with _forward_signals(processes) as asked:
        bad = _wait_for_processes(processes, asked)
    return _report_exit([process.returncode for process in processes], bad, asked)


@contextlib.contextmanager
def _forward_signals(processes: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Hand Ctrl-C and SIGTERM on to processes; give the list of signals that came."""
    asked: list[int] = []
    began = time.monotonic()

    def forward_signal(signum: int, _: Any) -> None:
        if time.monotonic() - began < STARTUP_SECONDS:
            signum = signal.SIGTERM  # Ctrl-C would be told by Python, with a traceback
        asked.append(signum)
        for process in processes:
            if process.poll() is None:
                process.send_signal(signum)

    before = {n: signal.signal(n, forward_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start_processes(command_args: Sequence[str], devices: int) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = str(max(1, count_cpu_cores() // devices))
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(devices),
        "LOCAL_WORLD_SIZE": str(devices),
        "GROUP_RANK": "0",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        LAUNCHER_PID_ENV: str(os.getpid()),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", "vlbench", *command_args],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,  # so that Ctrl-C comes once, from here
        )
        for rank in range(devices)
    ]


def _wait_for_processes(
    processes: list[subprocess.Popen[bytes]], received_signals: list[int]
) -> int | None:
    """Return when all have ended, with the number of the one that ended badly before the others.

    When one has, or Ctrl-C came a second time, the rest is given a little time and then killed.
    """
    bad, until = None, math.inf
    while True:
        codes = [process.poll() for process in processes]
        failed = [number for number, code in enumerate(codes) if code]
        if failed and bad is None:  # of two at once, the one that was killed is the reason
            bad = min(failed, key=lambda number: codes[number] or 0)
        if until == math.inf and (bad is not None or received_signals.count(signal.SIGINT) > 1):
            until = time.monotonic() + GRACE_SECONDS
        if None not in codes:
            return bad
        if time.monotonic() > until:
            for process in processes:
                process.kill()
        time.sleep(POLL_SECONDS)


def _report_exit(
    exit_codes: list[int], first_failed: int | None, received_signals: list[int]
) -> int:
    """Say what ended processes that did not say it themselves; return the exit code of all.

    `bad` is the process that ended badly before the others, `asked` what they were sent before.
    """
    if first_failed is None:
        return 0
    if -exit_codes[first_failed] in received_signals or (
        exit_codes[first_failed] < 0 and received_signals.count(signal.SIGINT) > 1
    ):
        if exit_codes[0] >= 0:
            return exit_codes[0]
        print("vlbench: interrupted", file=sys.stderr)  # it had nothing to save, or could not
        return INTERRUPTED_EXIT_CODE
    if exit_codes[first_failed] < 0:
        name = signal.Signals(-exit_codes[first_failed]).name
        print(
            f"vlbench: process {first_failed} of {len(exit_codes)} was ended by {name}, and so "
            "the others were "
            "ended too; checkpoints are whole",
            file=sys.stderr,
        )
        return 1
    return exit_codes[0] if exit_codes[0] > 0 else max(exit_codes)
