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
QUIET = ("log.every=1", "log.questions=2", "log.examples=0", "log.tensorboard=false")


def losses(run: Path) -> list[float]:
    """Return the loss of every step in the log of a run."""
    with (run / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@dataclass(frozen=True)
class Job:
    """A command `fit`, stopped after step `stop` (0: never), computed in float64 on request."""

    words: tuple[str, ...]
    stop: int = 0
    double: bool = False


def do(job: Job) -> int:
    """Run a command in this process and return its exit code."""
    from vlbench.__main__ import main
    from vlbench.train import stages
    from vlbench.train.watchers import Saving

    real_after, real_prepare = Saving.after, stages.prepare

    def after(self: Saving, training: Any, step: Any) -> None:
        if training.position == job.stop:
            self.interrupts.wanted = "a test"
        real_after(self, training, step)

    def prepare(*given: Any) -> Any:
        vlm, start = real_prepare(*given)
        return (vlm.double() if job.double else vlm), start

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saving, "after", after)
        patch.setattr(stages, "prepare", prepare)
        try:
            return main(["fit", *job.words])
        except SystemExit as end:
            return int(end.code or 0)


def _work(rank: int, ports: list[int], jobs: list[Job], answers: Queue) -> None:
    torch.set_num_threads(1)
    codes = []
    for port, job in zip(ports, jobs, strict=True):
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(WORLD),
            "GROUP_RANK": "0",
        }
        try:
            codes.append(do(job))
        except Exception:
            traceback.print_exc()
            codes.append(1)  # the other process would wait for its answer
    answers.put((rank, codes))


def in_two(jobs: list[Job], seconds: float = 300) -> list[tuple[int, int]]:
    """Run commands in two processes, one after the other; return both exit codes of each."""
    context = multiprocessing.get_context("spawn")
    answers: Queue = context.Queue()
    ports = [_free_port() for _ in jobs]
    started = [
        context.Process(target=_work, args=(rank, ports, jobs, answers)) for rank in range(WORLD)
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
