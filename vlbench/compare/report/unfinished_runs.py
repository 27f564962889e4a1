"""Runs below a folder that have no results: a report names them beside those that have.

A row whose runs have all diverged would else be missing without a word, and the correction for
several pairs be over fewer of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlbench.compare.report.nested_files import files_below
from vlbench.compare.report.sweep_summary import SWEEP_FOLDER, SWEEP_SEED
from vlbench.text_files import read_yaml

UNFINISHED_REASON = "it is not finished: its own fit command, or that of its comparison, goes on"


def find_unfinished_runs(folders: Sequence[Path]) -> dict[Path, str]:
    """Return folder -> reason of the runs below folders that have diverged or are not finished.

    The trials of a learning-rate sweep are left out.
    """
    found = {
        file.parent
        for folder in folders
        if not (folder / "recipe.yaml").is_file()  # else it is a run itself
        for file in files_below(folder, "recipe.yaml")
        if _is_unfinished(file.parent) and not is_trial(file.parent)
    }
    return {folder: _reason(folder) for folder in sorted(found)}


def is_trial(folder: Path) -> bool:
    """Tell whether a run is a trial of a learning-rate sweep, which has a seed that only they have.

    A user's own folder may have the name of theirs.
    """
    recipe = folder / "recipe.yaml"
    is_inside = SWEEP_FOLDER in folder.parts and recipe.is_file()
    return is_inside and read_yaml(recipe).get("seed") == SWEEP_SEED


def _is_unfinished(folder: Path) -> bool:
    """Tell whether a folder with a recipe is a run, which has a folder of checkpoints, at work.

    Checkpoints, exports and grafts have a recipe, too.
    """
    return (folder / "checkpoints").is_dir() and not (folder / "results.json").is_file()


def _reason(folder: Path) -> str:
    from vlbench.train.run_folder import RunFolder  # imports torch

    return RunFolder(folder).read_divergence() or UNFINISHED_REASON
