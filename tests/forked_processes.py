"""Processes that share a process group, forked: they import nothing anew and start in no time.

The remarks of `forked_command` on forks after `import torch` hold here, too.
"""

from __future__ import annotations

import multiprocessing
import socket
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed


def run_in_processes(function: Callable[[int], Any], world_size: int = 2) -> list[Any]:
    """Call `function(rank)` in `world_size` processes of one gloo group; return what each gave.

    Raises an AssertionError with the stack trace of what failed.
    """
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run_rank(rank: int) -> None:
        torch.set_num_threads(1)
        try:
            distributed.init_process_group(
                "gloo",
                init_method=f"tcp://127.0.0.1:{port}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=60),
            )
            answers.put((rank, function(rank), ""))
            distributed.destroy_process_group()
        except BaseException:
            answers.put((rank, None, traceback.format_exc()))

    processes = [context.Process(target=run_rank, args=(rank,)) for rank in range(world_size)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside other threads
        for process in processes:
            process.start()
    try:
        results = sorted((answers.get(timeout=120) for _ in processes), key=lambda one: one[0])
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    failures = [trace for _, _, trace in results if trace]
    assert not failures, "\n".join(failures)
    return [result for _, result, _ in results]
