"""Loggers beside metrics.csv: TensorBoard, and Weights & Biases for those who have it."""

from __future__ import annotations

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from vlbench.config.schema import Recipe
from vlbench.errors import UserError
from vlbench.train.run_folder import RunFolder


def build_loggers(recipe: Recipe, run: RunFolder, last_kept_step: int) -> list[Logger]:
    """Return the loggers that a recipe asks for; what they hold beyond `step` is discarded."""
    loggers: list[Logger] = []
    if recipe.log.tensorboard:
        loggers.append(
            TensorBoardLogger(
                run.folder, name="", version="tensorboard", purge_step=last_kept_step + 1
            )
        )
    if recipe.log.wandb:
        from lightning.pytorch.loggers import WandbLogger

        try:
            loggers.append(
                WandbLogger(project=recipe.log.wandb, save_dir=run.folder, id=run.folder.name)
            )
        except ModuleNotFoundError as error:
            raise UserError("log.wandb needs: pip install 'vlbench[wandb]'") from error
    return loggers
