"""What this machine has for a training, and what is refused because it would be too much for it.

Looked at before anything is started; it imports no torch.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

from vlbench.config.schema import Recipe, TrainerConfig
from vlbench.errors import UserError

WORKERS_PER_CORE = 8  # more only wait for each other; below, they may wait for a disk or a server


def count_cpu_cores() -> int:
    """Return how many processor cores this process may use: its affinity, where there is one."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def count_gpus() -> int:
    """Return how many NVIDIA GPUs the driver shows to this process, as CUDA_VISIBLE_DEVICES says.

    0 without a driver, also on machines with GPUs of others.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def check_machine_limits(recipe: Recipe, already_launched: bool) -> None:
    """Refuse more processes than this machine has GPUs, or without GPUs cores, to run them.

    With `started` another program has started the processes, and may have given each its own cores.
    """
    settings = recipe.trainer
    here = 1 if already_launched or settings.num_nodes > 1 else settings.devices
    if here > 1:
        _check_processes(settings)
    for key, data in (
        ("data", recipe.data),
        *((f"stages.{name}.data", stage.data) for name, stage in recipe.stages.items()),
    ):
        if data and data.workers * here > WORKERS_PER_CORE * count_cpu_cores():
            raise UserError(
                f"{key}.workers is {data.workers}"
                + (f" for each of {here} processes" if here > 1 else "")
                + f", and there are {_count_with_noun(count_cpu_cores(), 'processor core')}: "
                f"at most {max(1, WORKERS_PER_CORE * count_cpu_cores() // here)}"
            )


def check_parallel_runs(recipes: Sequence[Recipe], parallel_runs: int) -> None:
    """Refuse a comparison of which `at_once` runs together are too much for this machine."""
    for recipe in recipes:
        check_machine_limits(recipe, already_launched=False)
    each = max(recipe.trainer.devices for recipe in recipes)
    most = max(1, max(count_cpu_cores(), count_gpus()) // each)
    if parallel_runs > most:
        runs = f"runs of {each} processes" if each > 1 else "runs at once"
        raise UserError(
            f"jobs is {parallel_runs}, {runs}, and there are "
            f"{_count_with_noun(count_cpu_cores(), 'processor core')}: "
            f"at most {most}"
        )


def _check_processes(settings: TrainerConfig) -> None:
    there = 0 if settings.accelerator == "cpu" else count_gpus()
    most = there or count_cpu_cores()
    if settings.devices <= most:
        return
    have = (
        _count_with_noun(there, "GPU")
        if there
        else f"{_count_with_noun(count_cpu_cores(), 'processor core')} and no GPU"
    )
    raise UserError(
        f"trainer.devices is {settings.devices}, and this machine has {have} for this process: "
        f"at most {most}, as every device is a process"
    )


def _count_with_noun(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
