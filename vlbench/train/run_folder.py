"""The folder of a run: it describes itself, can be resumed, and belongs to one recipe."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from vlbench.config import recipe as recipes
from vlbench.config.schema import Recipe
from vlbench.errors import UserError
from vlbench.model.weights.weight_origin import (
    WeightOrigin,
    check_same_origin,
    origins_to_json,
    read_origins,
)
from vlbench.text_files import read_json, write_atomically
from vlbench.train import checkpoint_files
from vlbench.train.checkpoint_files import RunPosition
from vlbench.version import __version__

RECORDED_PACKAGES = (
    "torch",
    "lightning",
    "transformers",
    "open_clip_torch",
    "timm",
    "peft",
    "omegaconf",
)


class RunFolder:
    """The folder of a run, open for training."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`, which exists."""
        self.folder = folder
        self.checkpoints_folder = folder / "checkpoints"
        self.recipe_file = folder / "recipe.yaml"
        self.results_file = folder / "results.json"
        self.quarantine_file = folder / "quarantine.jsonl"
        self.versions_file = folder / "versions.json"

    @property
    def is_finished(self) -> bool:
        """True if the run has its results."""
        return self.results_file.is_file()

    @property
    def latest_position(self) -> RunPosition | None:
        """The position of the newest complete checkpoint, None before the first."""
        positions = checkpoint_files.list_positions(self.checkpoints_folder)
        return positions[-1] if positions else None

    def checkpoint_path(self, position: RunPosition) -> Path:
        """Return the folder of a checkpoint."""
        return self.checkpoints_folder / position.folder_name

    def discard_if_empty(self) -> None:
        """Remove the folder if it holds nothing but the description of the run."""
        described = {
            self.recipe_file,
            self.versions_file,
            self.checkpoints_folder,
            self.quarantine_file,
        }
        if set(self.folder.iterdir()) <= described and not any(self.checkpoints_folder.iterdir()):
            shutil.rmtree(self.folder)

    def record_weight_origins(self, origins: Mapping[str, WeightOrigin]) -> None:
        """Record the first weights of each part; refuse other ones when the run is resumed."""
        recorded = read_origins(self.versions_file, "weights")
        for part, origin in origins.items():
            check_same_origin(part, recorded.get(part), origin, str(self.folder))
        if not recorded:
            versions = read_json(self.versions_file) if self.versions_file.is_file() else {}
            text = json.dumps({**versions, "weights": origins_to_json(origins)}, indent=1)
            write_atomically(self.versions_file, text)


def open_run(recipe: Recipe) -> RunFolder:
    """Open the run folder of `recipe`, new or to be resumed; refuse one of another recipe."""
    folder = Path(recipe.run) if recipe.run else next_run_folder(recipe)
    run = RunFolder(folder)
    if run.recipe_file.is_file():
        _check_same_recipe(recipe, run)
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"run={folder} is a folder with other things in it; name a new one")
    try:
        run.checkpoints_folder.mkdir(parents=True, exist_ok=True)
        for unfinished in run.checkpoints_folder.glob(".writing-*"):
            shutil.rmtree(unfinished)
        if not run.recipe_file.is_file():
            text = json.dumps(collect_versions(), indent=1)
            run.versions_file.write_text(text, encoding="utf-8")
            recipes.save_recipe(recipe, run.recipe_file)
    except OSError as error:
        raise _explain_folder_error(error, folder) from error
    return run


def _explain_folder_error(error: OSError, folder: Path) -> Exception:
    if isinstance(error, FileExistsError | NotADirectoryError):
        return UserError(f"run={folder} is not a folder")
    if error.errno == errno.ENOSPC:
        return checkpoint_files.explain_write_error(error, folder)
    return UserError(f"run={folder} cannot be written ({error.strerror})")


def next_run_folder(recipe: Recipe) -> Path:
    """Return the first unused `runs/<recipe>-<size>-<n>`."""
    number = 1
    name = Path(recipe.recipe).stem
    while (folder := Path("runs") / f"{name}-{recipe.size}-{number}").exists():
        number += 1
    return folder


def _check_same_recipe(recipe: Recipe, run: RunFolder) -> None:
    changed = recipes.recipe_differences(recipes.load_recipe_file(run.recipe_file), recipe)
    if changed:
        raise UserError(
            f"run={run.folder} belongs to another recipe; it differs in {', '.join(changed)}. "
            "Name another run, or repeat the command that made this one"
        )


def collect_versions() -> dict[str, str]:
    """Return the versions of everything that numbers depend on, and the commit of this checkout."""
    versions = {"python": platform.python_version(), "vlbench": __version__}
    for name in RECORDED_PACKAGES:
        versions[name] = importlib.metadata.version(name)
    return versions | {"commit": git_commit()}


def git_commit() -> str:
    """Return the commit of the checkout that vlbench runs from, or "" if it is installed."""
    git = shutil.which("git")
    if git is None:
        return ""
    result = subprocess.run(
        [git, "rev-parse", "HEAD"],
        cwd=Path(__file__).resolve().parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip()
