"""Start several training processes on this machine, watch them, and end them together.

torchrun and Slurm start processes as well (docs/cluster.md); this is for one machine without them.
It imports no torch.
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
from vlbench.stop_signals import handle_stop_signals

LAUNCHER_PID_ENV = "VLBENCH_LAUNCHER"  # environment variable, set to our process id
TORCHELASTIC_ENV = "TORCHELASTIC_RUN_ID"  # environment variable that torchrun sets
GRACE_SECONDS = 20.0  # until the others are killed, once one has failed
POLL_SECONDS = 0.1
ORPHAN_GRACE_SECONDS = 120.0  # to end the step and save, when the launcher has died
PARENT_POLL_SECONDS = 1.0  # between checks of the launcher
SLURM_EXIT_SECONDS = 10.0  # in which other tasks of Slurm have ended
STARTUP_SECONDS = 2.0  # in which Python starts, and training cannot have begun
INTERRUPTED_EXIT_CODE = 128 + signal.SIGINT  # of a process that was asked to stop


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether a launcher (ours, torchrun or srun) has started this process."""
    return "LOCAL_RANK" in environment or is_slurm_task(environment)


def is_slurm_task(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether srun has started this process, and others beside it.

    What torchrun has started is none of its tasks, although they share an environment: srun starts
    torchrun on every machine, which starts the processes there and gives them their ranks.
    """
    is_of_torchrun = TORCHELASTIC_ENV in environment
    return not is_of_torchrun and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def exit_silently_on_ctrl_c() -> None:
    """Let Ctrl-C end this process without a message while it has nothing to save.

    The launcher forwards Ctrl-C, and prints one message for all processes.
    """
    if LAUNCHER_PID_ENV in os.environ and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def report_error_once() -> Iterator[None]:
    """Let only the first of several processes report a UserError that all of them raise."""
    try:
        yield
    except UserError:
        rank = os.environ.get("SLURM_PROCID" if is_slurm_task() else "RANK", "0")
        if is_launched() and rank != "0":
            raise SystemExit(silent_exit_code(2)) from None
        raise


def silent_exit_code(exit_code: int) -> int:
    """Return the exit code of a process that exits while another one reports the reason.

    srun kills all tasks when one exits with a code other than 0, also the one that still has to
    print, and then returns the code of a killed one.
    """
    return 0 if is_slurm_task() else exit_code


def final_exit_code(exit_code: int) -> int:
    """Return the exit code of the process that reports, when the others have exited."""
    if exit_code and is_slurm_task():
        time.sleep(SLURM_EXIT_SECONDS)
    return exit_code


def is_launcher_gone() -> bool:
    """Tell whether the launcher that has started this process has died."""
    return LAUNCHER_PID_ENV in os.environ and os.getppid() != int(os.environ[LAUNCHER_PID_ENV])


def end_with_launcher() -> None:
    """Let this process stop and save when its launcher has died, by kill -9 as well.

    A dead launcher forwards no signals. A process that does not stop, as it waits for another one,
    is killed after `ORPHAN_GRACE_SECONDS`.
    """
    if LAUNCHER_PID_ENV in os.environ or TORCHELASTIC_ENV in os.environ:
        started_by = int(os.environ.get(LAUNCHER_PID_ENV, os.getppid()))
        threading.Thread(target=_exit_after_launcher, args=(started_by,), daemon=True).start()


def _exit_after_launcher(launcher_pid: int) -> None:
    """Wait until the launcher has exited, then end this process."""
    while os.getppid() == launcher_pid:
        time.sleep(PARENT_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def isolate_data_worker(_: int) -> None:
    """Take a data worker out of the process group of its run, as DataLoader's `worker_init_fn`.

    Signals to the group (Ctrl-C, Slurm before it preempts) are for the run, which stops after its
    step; they would kill workers in the middle of it. Workers exit with their run at once, also in
    the middle of a sample.
    """
    os.setpgrp()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait until the parent process has exited, then exit."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def launch_processes(
    command_args: Sequence[str], settings: TrainerConfig, module: str = "vlbench"
) -> int:
    """Run `python -m MODULE ARGS` in `settings.devices` processes; return the exit code.

    Ctrl-C, SIGTERM and SIGHUP are forwarded. When one process fails, or Ctrl-C comes twice, the
    others have `GRACE_SECONDS` to exit before they are killed.
    """
    if settings.num_nodes > 1:
        raise UserError(
            f"trainer.num_nodes is {settings.num_nodes}: start the command on every machine with "
            f"srun (a task per GPU) or torchrun --nproc-per-node={settings.devices}; "
            "docs/cluster.md has both"
        )
    processes = _start_processes([module, *command_args], settings.devices)
    with _forward_signals(processes) as received_signals:
        first_failed = _wait_for_processes(processes, received_signals)
    exit_codes = [process.returncode for process in processes]
    return _report_exit(exit_codes, first_failed, received_signals)


@contextlib.contextmanager
def _forward_signals(processes: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Forward Ctrl-C, SIGTERM and SIGHUP to processes; yield the list of signals that came."""
    received_signals: list[int] = []
    started_at = time.monotonic()

    def forward_signal(signum: int, _: Any) -> None:
        if time.monotonic() - started_at < STARTUP_SECONDS:
            signum = signal.SIGTERM  # for Ctrl-C Python would print a traceback
        received_signals.append(signum)
        for process in processes:
            if process.poll() is None:
                process.send_signal(signum)

    restore_handlers = handle_stop_signals(forward_signal)
    try:
        yield received_signals
    finally:
        restore_handlers()


def _start_processes(module_args: Sequence[str], devices: int) -> list[subprocess.Popen[bytes]]:
    """Start `python -m` for each device, with the environment variables of torchrun."""
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        port = free_socket.getsockname()[1]
    threads = str(max(1, count_cpu_cores() // devices))
    environment = {
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
            [sys.executable, "-m", *module_args],
            env=os.environ | environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,  # so that Ctrl-C comes once, from this process
        )
        for rank in range(devices)
    ]


def _wait_for_processes(
    processes: list[subprocess.Popen[bytes]], received_signals: list[int]
) -> int | None:
    """Wait until all processes have exited; return the rank of the first that failed, or None.

    When one has failed, or Ctrl-C came a second time, the rest has `GRACE_SECONDS` to exit.
    """
    first_failed, deadline = None, math.inf
    while True:
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed and first_failed is None:  # of two at once, the one that was killed is the reason
            first_failed = min(failed, key=lambda rank: codes[rank] or 0)
        is_killed = received_signals.count(signal.SIGINT) > 1
        if deadline == math.inf and (first_failed is not None or is_killed):
            deadline = time.monotonic() + GRACE_SECONDS
        if None not in codes:
            return first_failed
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(POLL_SECONDS)


def _report_exit(
    exit_codes: list[int], first_failed: int | None, received_signals: list[int]
) -> int:
    """Print what ended processes that could not print it themselves; return one exit code.

    `first_failed` is the rank of the process that failed before the others, `received_signals` are
    the signals that were forwarded.
    """
    if first_failed is None:
        return 0
    if -exit_codes[first_failed] in received_signals or (
        exit_codes[first_failed] < 0 and received_signals.count(signal.SIGINT) > 1
    ):
        if exit_codes[0] >= 0:
            return exit_codes[0]
        print("vlbench: interrupted", file=sys.stderr)  # before it could save, or by a kill
        return INTERRUPTED_EXIT_CODE
    if exit_codes[first_failed] < 0:
        name = signal.Signals(-exit_codes[first_failed]).name
        print(
            f"vlbench: process {first_failed} of {len(exit_codes)} was ended by {name}, and so "
            "the others were ended too; checkpoints are whole",
            file=sys.stderr,
        )
        return 1
    return exit_codes[0] if exit_codes[0] > 0 else max(exit_codes)
