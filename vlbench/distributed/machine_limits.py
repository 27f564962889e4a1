"""Cores and GPUs of this machine, and checks that a recipe does not ask for more of them.

They run before anything is started, and import no torch.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlbench.config.data_schema import DataConfig
from vlbench.config.schema import Recipe, TrainerConfig
from vlbench.errors import UserError

MEMORY_FILE, CGROUP_FOLDER = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
WORKERS_PER_CORE = 8  # more only wait for each other; below, they may wait for a disk or a server


def count_cpu_cores() -> int:
    """Return how many CPU cores this process may use, by its affinity where there is one."""
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


def free_host_memory() -> int:
    """Return the bytes of memory that processes of this machine, or of this container, can take."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if MEMORY_FILE.is_file():
        with MEMORY_FILE.open(encoding="ascii") as lines:
            amounts = dict(line.split(":") for line in lines)
        free = int(amounts["MemAvailable"].split()[0]) * 1024
    try:
        most, used = ((CGROUP_FOLDER / f"memory.{name}").read_text() for name in ("max", "current"))
    except OSError:  # no container, or one of the first version
        return free
    return free if most.strip() == "max" else max(0, min(free, int(most) - int(used)))


def check_machine_limits(
    settings: TrainerConfig, data_by_key: Mapping[str, DataConfig], already_launched: bool
) -> None:
    """Refuse more processes than this machine has GPUs, or without GPUs cores, to run them.

    With `already_launched` another program has started the processes, and may have given each its
    own cores.
    """
    process_count = 1 if already_launched or settings.num_nodes > 1 else settings.devices
    if process_count > 1:
        _check_processes(settings)
    for key, data in data_by_key.items():
        if data.workers * process_count > WORKERS_PER_CORE * count_cpu_cores():
            raise UserError(
                f"{key}.workers is {data.workers}"
                + (f" for each of {process_count} processes" if process_count > 1 else "")
                + f", and there are {_count_with_noun(count_cpu_cores(), 'processor core')}: "
                f"at most {max(1, WORKERS_PER_CORE * count_cpu_cores() // process_count)}"
            )


def check_parallel_runs(recipes: Sequence[Recipe], parallel_runs: int) -> None:
    """Refuse a comparison whose `parallel_runs` runs at once need more than this machine has."""
    for recipe in recipes:
        check_machine_limits(recipe.trainer, recipe.data_by_key, already_launched=False)
    processes_per_run = max(recipe.trainer.devices for recipe in recipes)
    most = max(1, max(count_cpu_cores(), count_gpus()) // processes_per_run)
    if parallel_runs > most:
        runs = f"runs of {processes_per_run} processes" if processes_per_run > 1 else "runs at once"
        raise UserError(
            f"jobs is {parallel_runs}, {runs}, and there are "
            f"{_count_with_noun(count_cpu_cores(), 'processor core')}: "
            f"at most {most}"
        )


def _check_processes(settings: TrainerConfig) -> None:
    """Refuse more processes than there are GPUs, or without GPUs cores."""
    gpu_count = 0 if settings.accelerator == "cpu" else count_gpus()
    most = gpu_count or count_cpu_cores()
    if settings.devices <= most:
        return
    available = (
        _count_with_noun(gpu_count, "GPU")
        if gpu_count
        else f"{_count_with_noun(count_cpu_cores(), 'processor core')} and no GPU"
    )
    raise UserError(
        f"trainer.devices is {settings.devices}, and this machine has {available} for this "
        f"process: at most {most}, as every device is a process"
    )


def _count_with_noun(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
