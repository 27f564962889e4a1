"""A run: a folder that describes itself, can be resumed, and never belongs to another recipe."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from vlbench import __version__
from vlbench import recipe as recipes
from vlbench.files import read_json, write_whole
from vlbench.mistakes import Mistake
from vlbench.model.weights.origin import WeightOrigin, check_origin, origins_json, read_origins
from vlbench.schema import Recipe
from vlbench.train import checkpoint
from vlbench.train.checkpoint import Position

RECORDED = ("torch", "lightning", "transformers", "open_clip_torch", "timm", "peft", "omegaconf")


class Run:
    """The folder of a run, open for training."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`, which exists."""
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.recipe_file = folder / "recipe.yaml"
        self.results_file = folder / "results.json"
        self.quarantine_file = folder / "quarantine.jsonl"
        self.versions_file = folder / "versions.json"

    @property
    def finished(self) -> bool:
        """True when the run has its results."""
        return self.results_file.is_file()

    @property
    def latest(self) -> Position | None:
        """The newest whole checkpoint, None before the first."""
        found = checkpoint.positions(self.checkpoints)
        return found[-1] if found else None

    def path(self, position: Position) -> Path:
        """Return the folder of a checkpoint."""
        return self.checkpoints / position.folder

    def discard(self) -> None:
        """Remove the folder if it holds nothing yet but the description of the run."""
        described = {self.recipe_file, self.versions_file, self.checkpoints, self.quarantine_file}
        if set(self.folder.iterdir()) <= described and not any(self.checkpoints.iterdir()):
            shutil.rmtree(self.folder)

    def record_weights(self, origins: Mapping[str, WeightOrigin]) -> None:
        """Note what the parts of the model began as; refuse other weights than at the beginning."""
        before = read_origins(self.versions_file, "weights")
        for part, origin in origins.items():
            check_origin(part, before.get(part), origin, str(self.folder))
        if not before:
            said = read_json(self.versions_file) if self.versions_file.is_file() else {}
            text = json.dumps({**said, "weights": origins_json(origins)}, indent=1)
            write_whole(self.versions_file, text)


def open_run(recipe: Recipe) -> Run:
    """Open the run folder of `recipe`, new or to be resumed; refuse one of another recipe."""
    folder = Path(recipe.run) if recipe.run else next_folder(recipe)
    run = Run(folder)
    if run.recipe_file.is_file():
        _check_same(recipe, run)
    elif folder.is_dir() and any(folder.iterdir()):
        raise Mistake(f"run={folder} is a folder with other things in it; name a new one")
    try:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        for torn in run.checkpoints.glob(".writing-*"):
            shutil.rmtree(torn)
        if not run.recipe_file.is_file():
            text = json.dumps(versions(), indent=1)
            run.versions_file.write_text(text, encoding="utf-8")
            recipes.save(recipe, run.recipe_file)
    except OSError as error:
        raise _unusable(error, folder) from error
    return run


def _unusable(error: OSError, folder: Path) -> Exception:
    if isinstance(error, FileExistsError | NotADirectoryError):
        return Mistake(f"run={folder} is not a folder")
    if error.errno == errno.ENOSPC:
        return checkpoint.out_of_space(error, folder)
    return Mistake(f"run={folder} cannot be written ({error.strerror})")


def next_folder(recipe: Recipe) -> Path:
    """Return the first unused `runs/<recipe>-<size>-<n>`."""
    number = 1
    name = Path(recipe.recipe).stem
    while (folder := Path("runs") / f"{name}-{recipe.size}-{number}").exists():
        number += 1
    return folder


def _check_same(recipe: Recipe, run: Run) -> None:
    changed = recipes.differences(recipes.load_file(run.recipe_file), recipe)
    if changed:
        raise Mistake(
            f"run={run.folder} belongs to another recipe; it differs in {', '.join(changed)}. "
            "Name another run, or repeat the command that made this one"
        )


def versions() -> dict[str, str]:
    """Return the versions of everything that numbers depend on, and the commit of this checkout."""
    found = {"python": platform.python_version(), "vlbench": __version__}
    for name in RECORDED:
        found[name] = importlib.metadata.version(name)
    return found | {"commit": commit()}


def commit() -> str:
    """Return the commit of the checkout that vlbench runs from, or "" outside of one."""
    git = shutil.which("git")
    here = Path(__file__).resolve().parent
    if git is None:
        return ""
    asked = subprocess.run(
        [git, "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip()
