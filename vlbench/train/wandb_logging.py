"""The run at Weights & Biases that a run folder logs to: its own, and the same when it goes on."""

from __future__ import annotations

import importlib.util
import re
import secrets

from lightning.pytorch.loggers import Logger

from vlbench.errors import UserError
from vlbench.train.run_folder import RunFolder

WANDB_ID_KEY = "wandb_id"
"""Of versions.json: the id of the run at Weights & Biases."""
LOCAL_RUN = re.compile(r"(?:offline-)?run-\d{8}_\d{6}-(.+)")
"""Name of the folder that wandb keeps of one start of a run; it ends in the run's id."""


def check_wandb(project: str | None) -> None:
    """Raise a UserError if `log.wandb` names a project and wandb is not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        raise UserError(f"log.wandb={project} needs: pip install wandb")


def build_wandb_logger(project: str, run: RunFolder) -> Logger:
    """Return the logger of a run to a project of Weights & Biases, under the name of its folder."""
    from lightning.pytorch.loggers import WandbLogger

    return WandbLogger(
        name=run.folder.name, project=project, save_dir=run.folder, id=keep_wandb_id(run)
    )


def keep_wandb_id(run: RunFolder) -> str:
    """Return the id of a run at Weights & Biases, the same whenever it goes on.

    It is chosen at random, since folders of several users and machines have the same name in a
    project. A run that an older version began goes on under the id that wandb's files tell, which
    was the name of its folder.
    """
    recorded = run.read_versions().get(WANDB_ID_KEY)
    if recorded:
        return str(recorded)
    local_runs = sorted(path.name for path in (run.folder / "wandb").glob("*run-*"))
    ids = [found[1] for name in local_runs if (found := LOCAL_RUN.fullmatch(name))]
    wandb_id = ids[-1] if ids else secrets.token_hex(8)
    run.record_versions({WANDB_ID_KEY: wandb_id})
    return wandb_id
