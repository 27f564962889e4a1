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

from vlbench import plugins
from vlbench.model.compiled import of_compiler
from vlbench.schema import Recipe
from vlbench.train import report
from vlbench.train.join import lost, spread
from vlbench.train.legs import Leg

PRECISION: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed"}


def root_device(recipe: Recipe) -> torch.device:
    """Return the device that the recipe trains on."""
    return trainer_of(recipe, [], None).strategy.root_device


def trainer_of(
    recipe: Recipe,
    loggers: list[Logger],
    folder: Path | None,
    callbacks: Sequence[pl.Callback] = (),
) -> pl.Trainer:
    """Return the Lightning Trainer of one stage; it saves nothing by itself.

    With `profile=true` a trace of some steps is written into `folder`.
    """
    with quiet():
        return pl.Trainer(
            **spread(recipe.trainer),
            precision=PRECISION[recipe.precision],
            max_epochs=1,
            logger=loggers,
            callbacks=list(callbacks),
            profiler=PyTorchProfiler(folder, "profile") if recipe.profile and folder else None,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
            use_distributed_sampler=False,
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
def explained(leg: Leg) -> Iterator[None]:
    """Turn what may end a stage from outside into one line that says what to do."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise report.out_of_memory(leg.name, leg.stage) from error
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise report.worker_ended(leg.name, error) from error
        if of_compiler(error):
            raise report.not_compiled(leg.name, error) from error
        if "can't allocate memory" in str(error):
            raise report.out_of_memory(leg.name, leg.stage) from error
        if not lost(error):
            plugins.blame(error)
        raise
    except Exception as error:
        plugins.blame(error)
        raise
