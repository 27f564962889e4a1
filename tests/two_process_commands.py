"""Commands given to two processes that train one model, as a launcher would start them."""

from __future__ import annotations

import csv
import multiprocessing
import os
import socket
import traceback
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import pytest
import torch

WORLD = 2
TWO = f"trainer.devices={WORLD}"
QUIET = ("log.every_n_steps=1", "log.questions=2", "log.examples=0", "log.tensorboard=false")


def read_losses(run: Path) -> list[float]:
    """Return the loss of every step in the log of a run."""
    with (run / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@dataclass(frozen=True)
class FitCommand:
    """A command `fit`, stopped after step `stop_step` (0: never), in float64 on request."""

    overrides: tuple[str, ...]
    stop_step: int = 0
    is_float64: bool = False


def run_fit_command(fit_command: FitCommand) -> int:
    """Run a command in this process and return its exit code."""
    from vlbench.__main__ import main
    from vlbench.train import fit
    from vlbench.train.callbacks import CheckpointCallback

    real_after, real_prepare = CheckpointCallback.on_step_end, fit.build_or_resume_model

    def stop_at_step(self: CheckpointCallback, training: Any, step: Any) -> None:
        if training.steps_done == fit_command.stop_step:
            self.graceful_stop.stop_reason = "a test"
        real_after(self, training, step)

    def prepare_precision(*given: Any) -> Any:
        vlm, start = real_prepare(*given)
        return (vlm.to(torch.float64) if fit_command.is_float64 else vlm), start

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointCallback, "on_step_end", stop_at_step)
        patch.setattr(fit, "build_or_resume_model", prepare_precision)
        try:
            return main(["fit", *fit_command.overrides])
        except SystemExit as end:
            return int(end.code or 0)


def group_threads() -> list[str]:
    """Return the names of this process's threads that belong to a process group or its store."""
    tasks = Path("/proc/self/task").glob("*/comm")
    return [name for task in tasks if "gloo" in (name := task.read_text()) or "tcpstore" in name]


def _run_rank(rank: int, ports: list[int], fit_commands: list[FitCommand], answers: Queue) -> None:
    torch.set_num_threads(1)
    codes = []
    for port, job in zip(ports, fit_commands, strict=True):
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(WORLD),
            "GROUP_RANK": "0",
        }
        try:
            code = run_fit_command(job)
            assert not (left := group_threads()), left
            codes.append(code)
        except Exception:
            traceback.print_exc()
            codes.append(1)  # the other process would wait for its answer
    answers.put((rank, codes))


def run_in_two_processes(
    fit_commands: list[FitCommand], seconds: float = 300
) -> list[tuple[int, int]]:
    """Run commands in two processes, one after the other; return both exit codes of each."""
    context = multiprocessing.get_context("spawn")
    answers: Queue = context.Queue()
    ports = [_free_port() for _ in fit_commands]
    started = [
        context.Process(target=_run_rank, args=(rank, ports, fit_commands, answers))
        for rank in range(WORLD)
    ]
    for process in started:
        process.start()
    try:
        codes = dict(answers.get(timeout=seconds) for _ in started)
    finally:
        for process in started:
            process.join(20)
            process.kill()
    return list(zip(codes[0], codes[1], strict=True))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
