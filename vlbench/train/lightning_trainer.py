"""Lightning's Trainer of one stage, its loggers, and clear messages for what may end it."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.profilers import PyTorchProfiler

from vlbench.compat.lightning_internals import (
    leave_signals_alone,
    set_autocast_context,
    trainer_device,
)
from vlbench.compat.torch_internals import is_compiler_error
from vlbench.config.schema import LoggingConfig, TrainerConfig
from vlbench.config.stage_schema import StageConfig
from vlbench.connector import registry
from vlbench.distributed.process_group import distributed_trainer_args, is_connection_error
from vlbench.model.mixed_precision import autocast_context
from vlbench.system_errors import is_memory_error
from vlbench.train import run_report
from vlbench.train.run_folder import RunFolder
from vlbench.train.wandb_logging import build_wandb_logger

LIGHTNING_PRECISION: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed"}


def root_device(trainer_config: TrainerConfig) -> torch.device:
    """Return the device that this process trains on."""
    return trainer_device(build_trainer(trainer_config, "32"))


def build_trainer(
    trainer_config: TrainerConfig,
    precision: str,
    loggers: Sequence[Logger] = (),
    callbacks: Sequence[pl.Callback] = (),
    profile_folder: Path | None = None,
) -> pl.Trainer:
    """Return the Lightning Trainer of one stage; it writes no checkpoints by itself.

    `precision` is `32` or `bf16`. A profiler trace of some steps is written into `profile_folder`.
    """
    with quiet_lightning():
        trainer = pl.Trainer(
            **distributed_trainer_args(trainer_config),
            precision=LIGHTNING_PRECISION[precision],
            max_epochs=1,
            logger=list(loggers),
            callbacks=list(callbacks),
            profiler=PyTorchProfiler(profile_folder, "profile") if profile_folder else None,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
            use_distributed_sampler=False,
        )
    leave_signals_alone(trainer)
    if precision == "bf16":
        device_type = trainer_device(trainer).type
        set_autocast_context(trainer, functools.partial(autocast_context, device_type, bf16=True))
    return trainer


def build_loggers(log_config: LoggingConfig, run: RunFolder, last_kept_step: int) -> list[Logger]:
    """Return the loggers beside metrics.csv; what they hold beyond `last_kept_step` is dropped."""
    loggers: list[Logger] = []
    if log_config.tensorboard:
        loggers.append(
            TensorBoardLogger(
                run.folder, name="", version="tensorboard", purge_step=last_kept_step + 1
            )
        )
    if log_config.wandb:
        loggers.append(build_wandb_logger(log_config.wandb, run))
    return loggers


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's hints and warnings until the end of `with`."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning.*")
        logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            logger.setLevel(level)


@contextlib.contextmanager
def explain_stage_errors(stage_name: str, stage: StageConfig) -> Iterator[None]:
    """Turn errors of memory, data workers and the compiler into one line that says what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if "DataLoader worker" in str(error):
            raise run_report.worker_died_error(stage_name, error) from error
        if is_compiler_error(error):
            raise run_report.compile_error(stage_name, error) from error
        if is_memory_error(error):
            raise run_report.out_of_memory_error(stage_name, stage) from error
        if not is_connection_error(error):
            registry.blame_connector_file(error)
        raise
    except Exception as error:
        registry.blame_connector_file(error)
        raise
