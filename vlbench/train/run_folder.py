"""The folder of a run: it describes itself, can be resumed, and belongs to one recipe."""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlbench.command_line.overrides import flatten_keys
from vlbench.config import recipe as recipes
from vlbench.config.schema import Recipe
from vlbench.connector import kept_source
from vlbench.errors import UserError
from vlbench.file_lock import hold_folder
from vlbench.model.weights.weight_origin import (
    WeightOrigin,
    check_same_origin,
    origins_to_json,
    read_origins,
)
from vlbench.strict_values import format_value
from vlbench.system_errors import FULL_DISK_REASONS
from vlbench.text_files import read_json, read_text, write_atomically
from vlbench.train import checkpoint_files, checkpoint_pruning
from vlbench.train.checkpoint_files import RunPosition
from vlbench.train.run_results_file import INFORMATION_FILE
from vlbench.version import __version__

NEW_RUNS_FOLDER = "runs"  # of runs that a command does not name
RECORDED_PACKAGES = (
    "torch",
    "lightning",
    "transformers",
    "open_clip_torch",
    "timm",
    "peft",
    "omegaconf",
)

RESUMABLE_KEYS = ("trainer", "log", "run", "dry_run", "profile", "trust_connector")
"""Keys that a run may change when it is resumed; so may `workers` of any data."""


class RunFolder:
    """The folder of a run, open for training."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`, which exists."""
        self.folder = folder
        self.checkpoints_folder = folder / "checkpoints"
        self.recipe_file = folder / "recipe.yaml"
        self.results_file = folder / "results.json"
        self.information_file = folder / INFORMATION_FILE
        self.quarantine_file = folder / "quarantine.jsonl"
        self.versions_file = folder / "versions.json"
        self.divergence_file = folder / "diverged.txt"

    @property
    def is_described_only(self) -> bool:
        """True if the folder holds at most what a run has before anything was trained.

        That is so too for one that was killed while it began.
        """
        names = {path.name for path in self.folder.iterdir() if path.name[0] != "."}
        hidden = {path.name.split(".")[1] for path in self.folder.glob(".*")}
        described = (
            self.recipe_file,
            self.versions_file,
            self.checkpoints_folder,
            self.quarantine_file,
            self.folder / kept_source.KEPT_FOLDER,
        )
        has_checkpoints = self.checkpoints_folder.is_dir() and any(
            self.checkpoints_folder.iterdir()
        )
        return (
            names <= {path.name for path in described}
            and hidden <= {"lock", *(path.stem for path in described)}  # and what is being written
            and not has_checkpoints
        )

    @property
    def is_finished(self) -> bool:
        """True if the run has its results."""
        return self.results_file.is_file()

    def is_complete(self, wants_information: bool) -> bool:
        """True if the run has its results and, where they are wanted, its information probes."""
        return self.is_finished and (self.information_file.is_file() or not wants_information)

    @property
    def latest_position(self) -> RunPosition | None:
        """The position of the newest complete checkpoint, None before the first."""
        positions = checkpoint_files.list_positions(self.checkpoints_folder)
        return positions[-1] if positions else None

    def checkpoint_path(self, position: RunPosition) -> Path:
        """Return the folder of a checkpoint."""
        return self.checkpoints_folder / position.folder_name

    def record_divergence(self, reason: str) -> None:
        """Note that the training was given up; `jobs=slurm` does not train the run again."""
        write_atomically(self.divergence_file, reason + "\n")

    def read_divergence(self) -> str:
        """Return why the training was given up; "" for a run that has not diverged."""
        return read_text(self.divergence_file).strip() if self.divergence_file.is_file() else ""

    def discard_if_empty(self) -> None:
        """Remove the folder if it holds nothing but the description of the run."""
        if self.is_described_only:
            shutil.rmtree(self.folder)

    def record_weight_origins(self, origins: Mapping[str, WeightOrigin]) -> None:
        """Record the first weights of each part; refuse other ones when the run is resumed."""
        recorded = read_origins(self.versions_file, "weights")
        for part, origin in origins.items():
            check_same_origin(part, recorded.get(part), origin, str(self.folder))
        if not recorded:
            self.record_versions({"weights": origins_to_json(origins)})

    def keep_row_tokens(self, stage_name: str, chosen_tokens: int) -> int:
        """Return the tokens of a packed row that a stage began with; those chosen, if it begins."""
        recorded: dict[str, int] = self.read_versions().get("max_tokens_per_row", {})
        if stage_name not in recorded:
            recorded = {**recorded, stage_name: chosen_tokens}
            self.record_versions({"max_tokens_per_row": recorded})
        return recorded[stage_name]

    def read_versions(self) -> dict[str, Any]:
        """Return the content of versions.json, {} where there is none."""
        return read_json(self.versions_file) if self.versions_file.is_file() else {}

    def record_versions(self, values: Mapping[str, object]) -> None:
        """Set keys of versions.json; the others stay."""
        versions = self.read_versions()
        if {**versions, **values} != versions:
            write_atomically(self.versions_file, json.dumps({**versions, **values}, indent=1))


def open_run(recipe: Recipe, held_locks: contextlib.ExitStack) -> RunFolder:
    """Open the run folder of `recipe`, new or to be resumed; refuse one of another recipe.

    Its lock is held by `held_locks`: no other process writes into it. A finished run needs none.
    """
    try:
        folder = (
            Path(recipe.run) if recipe.run else _make_next_run_folder(recipe.recipe, recipe.size)
        )
    except OSError as error:
        raise _explain_folder_error(error, Path(NEW_RUNS_FOLDER)) from error
    run = RunFolder(folder)
    _check_belongs(recipe, run)
    if run.is_finished:
        return run
    try:
        held_locks.enter_context(hold_folder(folder, f"run={folder}"))
        _check_belongs(recipe, run)  # again: the process that held it may have made it
        if run.is_finished:
            return run
        run.checkpoints_folder.mkdir(exist_ok=True)
        run.divergence_file.unlink(missing_ok=True)  # it is tried again
        checkpoint_pruning.remove_leftovers(run.checkpoints_folder)
        if not run.recipe_file.is_file():
            write_atomically(run.versions_file, json.dumps(collect_versions(), indent=1))
            if not kept_source.has_kept_source(folder):
                kept_source.keep_source(recipe.connector, folder)
                kept_source.note_own_callbacks(recipe.trainer.callbacks)
            recipes.save_recipe(recipe, run.recipe_file)
    except OSError as error:
        raise _explain_folder_error(error, folder) from error
    return run


def _explain_folder_error(error: OSError, folder: Path) -> Exception:
    if isinstance(error, FileExistsError | NotADirectoryError):
        return UserError(f"run={folder} is not a folder")
    if error.errno in FULL_DISK_REASONS:
        return checkpoint_files.explain_write_error(error, folder)
    return UserError(f"run={folder} cannot be written ({error.strerror})")


def _make_next_run_folder(recipe_name: str, size: str) -> Path:
    """Make the first unused `runs/<recipe>-<size>-<n>`, which no other process then gets."""
    for number in itertools.count(1):
        folder = Path(NEW_RUNS_FOLDER, f"{Path(recipe_name).stem}-{size}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            return folder
    raise AssertionError("numbers do not end")


def _check_belongs(recipe: Recipe, run: RunFolder) -> None:
    """Refuse the run of another recipe, and a folder that is no run."""
    if not run.recipe_file.is_file():
        if run.folder.is_dir() and not run.is_described_only:
            raise UserError(f"run={run.folder} is a folder with other things in it; name a new one")
        return
    changed = recipe_differences(recipes.load_recipe_file(run.recipe_file), recipe)
    if changed:
        raise UserError(
            f"run={run.folder} belongs to another recipe; it differs in {', '.join(changed)}. "
            "Name another run, or repeat the command that made this one"
        )
    if not run.is_finished:
        difference = kept_source.describe_other_source(recipe.connector, run.folder)
        if difference:
            raise UserError(
                f"run={run.folder} began with another connector: {difference}. Put the kept file "
                "back to go on, or begin a new run"
            )


def recipe_differences(before: Recipe, now: Recipe) -> list[str]:
    """Return keys that differ, as "seed (0 before, 1 now)"; not those a resume may change."""
    old, new = (flatten_keys(recipes.to_plain(recipe)) for recipe in (before, now))
    return [
        f"{key} ({format_value(old.get(key))} before, {format_value(new.get(key))} now)"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
        and key.split(".")[0] not in RESUMABLE_KEYS
        and not key.endswith("data.workers")
    ]


def collect_versions() -> dict[str, str]:
    """Return the versions of everything that numbers depend on, and the commit of this checkout."""
    versions = {"python": platform.python_version(), "vlbench": __version__}
    for name in RECORDED_PACKAGES:
        versions[name] = importlib.metadata.version(name)
    return versions | {"commit": git_commit()}


def git_commit() -> str:
    """Return the commit of the checkout that vlbench runs from, or "" if it is installed.

    An environment may lie in the checkout of another project, which does not track vlbench.
    """
    file = Path(__file__).resolve()
    return _run_git(file, "rev-parse", "HEAD") if _run_git(file, "ls-files", file.name) else ""


def _run_git(file: Path, *words: str) -> str:
    """Return what git prints in the folder of a file; "" where it fails or is not there."""
    git = shutil.which("git")
    if git is None:
        return ""
    result = subprocess.run(
        [git, *words], cwd=file.parent, capture_output=True, text=True, check=False
    )
    return result.stdout.strip() if result.returncode == 0 else ""
