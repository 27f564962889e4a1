"""This process as one of several: it finds the others, trains with them, and leaves."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import distributed

from vlbench import ranks
from vlbench.mistakes import Mistake, Trouble
from vlbench.schema import Recipe, Trainer
from vlbench.train.launch import by_slurm, launched, silent

BROKEN = ("gloo", "connection closed by peer", "connection reset by peer", "broken pipe", "nccl")
SETTLED = 0.05  # seconds; what they do takes microseconds
PATIENCE = timedelta(minutes=30)  # for another process; Lightning's default


@contextlib.contextmanager
def joined(recipe: Recipe) -> Iterator[None]:
    """Be one of the processes of `recipe`; all but the first are quiet.

    Raises a Mistake when another number of processes was started than the recipe says.
    """
    settings = recipe.trainer
    _check_gpus(settings)
    if not launched() or settings.processes == _environment().world_size() == 1:
        if settings.processes > 1:
            raise Mistake("several processes are started by the command line, torchrun or srun")
        yield
        return
    environment = _environment()
    if environment.world_size() != settings.processes:
        raise Mistake(
            f"trainer.devices={settings.devices} and trainer.num_nodes={settings.num_nodes} are "
            f"{settings.processes} processes, and {environment.world_size()} were started"
        )
    _meet(settings, environment)
    with contextlib.ExitStack() as stack:
        stack.callback(leave)
        if not ranks.is_first():
            quiet = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(quiet))
        stack.enter_context(_parting(environment.local_rank()))
        yield


@contextlib.contextmanager
def _parting(local_rank: int) -> Iterator[None]:
    """Let one process say why all end: the one that knows, or one of each machine."""
    try:
        yield
    except SystemExit as end:
        raise SystemExit(silent(int(end.code or 0))) from end
    except RuntimeError as error:
        if not lost(error):
            raise
        if local_rank:
            raise SystemExit(silent(1)) from error
        raise Trouble(
            "lost contact with the other processes: one of them has ended. Checkpoints are "
            "whole; to go on, repeat the command with the run= of this run"
        ) from error


def _settle() -> None:
    """Let gloo's threads end what they do after an exchange, before a data worker is forked.

    One of them may hold a lock of the interpreter at that moment; before Python 3.11.10 the worker
    then waits for it forever (python/cpython#112275; one start of a stage in 40, measured).
    """
    if ranks.several():
        time.sleep(SETTLED)


os.register_at_fork(before=_settle)


def leave() -> None:
    """Part from the other processes; what follows is done alone."""
    if ranks.several():
        distributed.destroy_process_group()


def lost(error: RuntimeError) -> bool:
    """Tell whether an error comes from what connects the processes."""
    if isinstance(error, distributed.DistError):
        return True
    return any(part in str(error).lower() for part in BROKEN)


def _check_gpus(settings: Trainer) -> None:
    """Refuse GPUs that are not there."""
    there = torch.cuda.device_count()
    if settings.accelerator == "mps" and not torch.backends.mps.is_available():
        raise Mistake("trainer.accelerator is mps, and torch finds none on this machine")
    if settings.accelerator == "gpu" and not (there or torch.backends.mps.is_available()):
        raise Mistake("trainer.accelerator is gpu, and torch finds no GPU on this machine")
    if settings.accelerator in ("auto", "gpu") and 0 < there < settings.devices:
        raise Mistake(f"trainer.devices is {settings.devices}, and torch finds {there} GPUs here")


def _environment() -> ClusterEnvironment:
    """Return what knows the numbers of this process."""
    return SLURMEnvironment(auto_requeue=False) if by_slurm() else TorchElasticEnvironment()


def _meet(settings: Trainer, environment: ClusterEnvironment) -> None:
    """Connect with the other processes: over GPUs where there are some, and over processors."""
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
            timeout=PATIENCE,
        )
    except distributed.DistNetworkError as error:  # the port is taken, or nobody is there
        raise Trouble(
            f"the processes cannot meet at {environment.main_address}:{environment.main_port} "
            f"({str(error)[:200]}): give another MASTER_PORT, or see whether all of them started"
        ) from error


def sharded(recipe: Recipe) -> bool:
    """Tell whether every process has a shard of the model instead of the whole."""
    return ranks.several() and recipe.trainer.strategy == "fsdp2"


def spread(settings: Trainer) -> dict[str, Any]:
    """Return the arguments of Lightning's Trainer that say where it runs, and with whom."""
    here = {"accelerator": settings.accelerator, "devices": 1}
    if not ranks.several():
        return here
    strategy: pl.strategies.Strategy
    if settings.strategy == "fsdp2":
        strategy = ModelParallelStrategy(ranks.size(), 1)
    else:
        # gradients and what is sent share memory; there are no buffers that change
        strategy = DDPStrategy(gradient_as_bucket_view=True, broadcast_buffers=False)
    return here | {
        "devices": settings.devices,
        "num_nodes": settings.num_nodes,
        "strategy": strategy,
        "plugins": [_environment()],
    }
