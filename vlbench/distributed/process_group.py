"""The process group of a training: joining and leaving it, and Lightning's strategy for it."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import distributed

from vlbench.compat.torch_internals import forget_process_groups
from vlbench.config.schema import TrainerConfig
from vlbench.distributed import collectives
from vlbench.distributed.launcher import (
    is_launched,
    is_slurm_task,
    report_error_once,
    silent_exit_code,
)
from vlbench.errors import EnvironmentFailure, UserError, one_line

LOST_PEER_MESSAGES = (
    "gloo",
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "nccl",
)
TIMEOUT_MESSAGES = ("timed out waiting", "wait timeout", "operation timeout")  # gloo, store, NCCL
GLOO_SETTLE_SECONDS = 0.05  # its threads need microseconds
SLURM_GPUS_HINT = (
    "Each task has to see all GPUs of its machine: ask for them with --gpus-per-node, without "
    "--gpus-per-task and --gpu-bind, which show a task its own alone"
)
STEP_TIMEOUT = timedelta(minutes=30)  # for another process in training; Lightning's default
CALL_TIMEOUT = timedelta(hours=24)
"""For what another process does for all: 70 GB of weights are downloaded at 1 MB/s in 20 hours. One
that ends closes its connections, and is not waited for."""


@contextlib.contextmanager
def join_process_group(settings: TrainerConfig) -> Iterator[None]:
    """Join the processes that train together, until the end of `with`; one prints.

    Raises a UserError when another number of processes was started than the recipe says.
    """
    # what all processes of one machine find is said by one; of several machines each has its own
    with report_error_once() if settings.num_nodes == 1 else contextlib.nullcontext():
        _check_gpus(settings)
    if not is_launched() or settings.world_size == _cluster_environment().world_size() == 1:
        if settings.world_size > 1:
            raise UserError("several processes are started by the command line, torchrun or srun")
        yield
        return
    environment = _cluster_environment()
    if environment.world_size() != settings.world_size:
        raise UserError(
            f"trainer.devices={settings.devices} and trainer.num_nodes={settings.num_nodes} are "
            f"{settings.world_size} processes, and {environment.world_size()} were started"
        )
    _init_process_group(settings, environment)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_left_in_the_end())
        if not collectives.is_rank_zero():
            quiet = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(quiet))
        stack.enter_context(_exit_together(environment.local_rank()))
        if settings.shard_within_node:
            check_neighbours(collectives.all_gather_objects(platform.node()), settings.devices)
        yield


@contextlib.contextmanager
def _left_in_the_end() -> Iterator[None]:
    """Leave the process group at the end of `with`, but not after an error where NCCL is in it.

    NCCL would wait for the other processes, which wait for this one (`abrupt_exit`).
    """
    try:
        yield
    except BaseException:
        if not _exchanges_by_nccl():
            leave_process_group()
            _end_group_threads()
        raise
    leave_process_group()
    _end_group_threads()  # again: what ran within `with` is garbage by now


def _exchanges_by_nccl() -> bool:
    return collectives.is_distributed() and "nccl" in distributed.get_backend_config()


def check_neighbours(hosts: Sequence[str], devices: int) -> None:
    """Refuse an order of ranks in which neighbours are on different machines; `hosts` by rank."""
    for first in range(0, len(hosts), devices):
        neighbours = hosts[first : first + devices]
        if len(set(neighbours)) > 1:
            raise collectives.error_for_rank(
                UserError(
                    f"trainer.shard_within_node=true needs the ranks of a machine next to each "
                    f"other, and ranks {first} to {first + len(neighbours) - 1} are on "
                    f"{', '.join(sorted(set(neighbours)))}: srun --distribution=block orders them"
                )
            )


@contextlib.contextmanager
def _exit_together(local_rank: int) -> Iterator[None]:
    """Let one process print why all end: the one that knows, or one of each machine."""
    try:
        yield
    except SystemExit as end:
        raise SystemExit(silent_exit_code(int(end.code or 0))) from end
    except RuntimeError as error:
        if not is_connection_error(error):
            raise
        timed_out = any(part in str(error).lower() for part in TIMEOUT_MESSAGES)
        # the first process may be the one that is waited for: the second speaks, too
        if local_rank and not (timed_out and collectives.rank() == 1):
            raise SystemExit(silent_exit_code(1)) from error
        reason = "lost contact with the other processes: one of them has ended"
        if timed_out:
            reason = (
                "another process did not answer in time "
                f"({STEP_TIMEOUT.total_seconds() / 60:.0f} minutes in a training step, "
                f"{CALL_TIMEOUT.total_seconds() / 3600:.0f} hours in what it does for all, as a "
                "download): it hangs, or its disk or network does"
            )
        raise EnvironmentFailure(
            f"{reason}. Checkpoints are whole; to go on, repeat the command with the run= of this "
            "run"
        ) from error


def _let_gloo_settle() -> None:
    """Let gloo's threads finish an exchange before a data worker is forked.

    One of them may hold a lock of the interpreter at that moment; before Python 3.11.10 the worker
    then waits for it forever (python/cpython#112275; one start of a stage in 40, measured).
    """
    if collectives.is_distributed():
        time.sleep(GLOO_SETTLE_SECONDS)


os.register_at_fork(before=_let_gloo_settle)


def leave_process_group() -> None:
    """Leave the process group; what follows is done by this process alone."""
    if collectives.is_distributed():
        collectives.call_group = None
        distributed.destroy_process_group()
        _end_group_threads()


def _end_group_threads() -> None:
    """Drop the last references to process groups that were destroyed: their threads end with them.

    Device meshes hold some, and sharded models are cycles of references. Threads that go on would
    meet the end of the other processes, or of the interpreter, at any moment.
    """
    forget_process_groups()
    gc.collect()


def is_connection_error(error: Exception) -> bool:
    """Tell whether an error comes from what connects the processes."""
    if isinstance(error, distributed.DistError):
        return True
    return any(part in str(error).lower() for part in LOST_PEER_MESSAGES)


def _check_gpus(settings: TrainerConfig) -> None:
    """Refuse accelerators that this machine does not have, and several processes on one mps."""
    gpu_count, has_mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if settings.accelerator == "mps" and not has_mps:
        raise UserError("trainer.accelerator is mps, and torch finds none on this machine")
    if settings.accelerator == "gpu" and not (gpu_count or has_mps):
        raise UserError("trainer.accelerator is gpu, and torch finds no GPU on this machine")
    if has_mps and settings.accelerator != "cpu" and settings.world_size > 1:
        raise UserError(
            f"trainer.devices={settings.devices} and trainer.num_nodes={settings.num_nodes} are "
            f"{settings.world_size} processes, and mps serves one: say trainer.accelerator=cpu, "
            "or trainer.devices=1"
        )
    if settings.accelerator in ("auto", "gpu") and 0 < gpu_count < settings.devices:
        noun = "GPU" if gpu_count == 1 else "GPUs"
        raise UserError(
            f"trainer.devices is {settings.devices}, and torch finds {gpu_count} {noun} here"
            + (f". {SLURM_GPUS_HINT}" if is_slurm_task() else "")
        )


def _cluster_environment() -> ClusterEnvironment:
    """Return Lightning's source of ranks and addresses: that of Slurm, or of torchrun."""
    return SLURMEnvironment(auto_requeue=False) if is_slurm_task() else TorchElasticEnvironment()


def _init_process_group(settings: TrainerConfig, environment: ClusterEnvironment) -> None:
    """Connect with the other processes: by gloo between CPUs, and by NCCL between GPUs."""
    os.environ["MASTER_ADDR"] = environment.main_address
    os.environ["MASTER_PORT"] = str(environment.main_port)
    backend = "gloo"
    if settings.accelerator in ("auto", "gpu") and torch.cuda.is_available():
        torch.cuda.set_device(environment.local_rank())
        backend = "cpu:gloo,cuda:nccl"
    try:
        distributed.init_process_group(
            backend,
            rank=environment.global_rank(),
            world_size=environment.world_size(),
            timeout=STEP_TIMEOUT,
        )
        all_processes = distributed.new_group(backend="gloo", timeout=CALL_TIMEOUT)
        assert isinstance(all_processes, distributed.ProcessGroup)  # it is an int in no member
        collectives.call_group = all_processes
    except distributed.DistNetworkError as error:  # the port is taken, or nobody is there
        raise EnvironmentFailure(
            f"the processes cannot meet at {environment.main_address}:{environment.main_port} "
            f"({one_line(error)}): give another MASTER_PORT, or see whether all of them started"
        ) from error


def is_fsdp_sharded(settings: TrainerConfig) -> bool:
    """Tell whether every process has a shard of the model instead of the whole."""
    return collectives.is_distributed() and settings.strategy == "fsdp2"


def distributed_trainer_args(settings: TrainerConfig) -> dict[str, Any]:
    """Return the arguments of Lightning's Trainer for devices, nodes and strategy."""
    trainer_args = {"accelerator": settings.accelerator, "devices": 1}
    if not collectives.is_distributed():
        return trainer_args
    strategy: pl.strategies.Strategy
    if settings.strategy == "fsdp2":
        strategy = ModelParallelStrategy(collectives.world_size(), 1)
    else:
        # gradients share memory with what is reduced; no buffer changes in training
        strategy = DDPStrategy(gradient_as_bucket_view=True, broadcast_buffers=False)
    return trainer_args | {
        "devices": settings.devices,
        "num_nodes": settings.num_nodes,
        "strategy": strategy,
        "plugins": [_cluster_environment()],
    }
