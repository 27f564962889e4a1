"""Lightning's Trainer of one stage, where it runs, and what it says when it cannot."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import PyTorchProfiler

from vlbench.compat.lightning_internals import trainer_device
from vlbench.compat.torch_internals import is_compiler_error
from vlbench.config.schema import Recipe
from vlbench.connector import registry
from vlbench.distributed.process_group import distributed_trainer_args, is_connection_error
from vlbench.train import run_report
from vlbench.train.stage_plan import StageRun

LIGHTNING_PRECISION: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed"}


def root_device(recipe: Recipe) -> torch.device:
    """Return the device that the recipe trains on."""
    return trainer_device(build_trainer(recipe, [], None))


def build_trainer(
    recipe: Recipe,
    loggers: list[Logger],
    profile_folder: Path | None,
    callbacks: Sequence[pl.Callback] = (),
) -> pl.Trainer:
    """Return the Lightning Trainer of one stage; it saves nothing by itself.

    With `profile=true` a trace of some steps is written into `folder`.
    """
    with quiet_lightning():
        return pl.Trainer(
            **distributed_trainer_args(recipe.trainer),
            precision=LIGHTNING_PRECISION[recipe.precision],
            max_epochs=1,
            logger=loggers,
            callbacks=list(callbacks),
            profiler=PyTorchProfiler(profile_folder, "profile")
            if recipe.profile and profile_folder
            else None,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
            use_distributed_sampler=False,
        )


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Leave out what Lightning says to authors of loops, until the end of `with`."""
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
def explain_stage_errors(stage_run: StageRun) -> Iterator[None]:
    """Turn what may end a stage from outside into one line that says what to do."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise run_report.out_of_memory_error(stage_run.name, stage_run.stage) from error
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise run_report.worker_died_error(stage_run.name, error) from error
        if is_compiler_error(error):
            raise run_report.compile_error(stage_run.name, error) from error
        if "can't allocate memory" in str(error):
            raise run_report.out_of_memory_error(stage_run.name, stage_run.stage) from error
        if not is_connection_error(error):
            registry.blame_connector_file(error)
        raise
    except Exception as error:
        registry.blame_connector_file(error)
        raise
