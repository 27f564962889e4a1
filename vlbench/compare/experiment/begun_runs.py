"""Runs in a comparison's folder that were begun otherwise than its rows now say: refused.

A comparison takes days, and is repeated to go on or to have more seeds. Files of recipes and
connectors may be edited meanwhile, and rows get other names where other things differ. Such runs
would be no seeds of their rows: the report could pair nothing, or all would be trained again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from vlbench.compare.experiment.equal_rows import identity_text
from vlbench.compare.experiment.grid import ComparisonGrid, GridRow, load_recipe
from vlbench.compare.experiment.run_jobs import TrainingJob
from vlbench.compare.report.nested_files import files_below
from vlbench.compare.report.unfinished_runs import is_trial
from vlbench.config import recipe as recipes
from vlbench.config.schema import Recipe
from vlbench.config.stage_schema import StageData
from vlbench.connector.kept_source import describe_other_source
from vlbench.data.data_checksums import (
    CHECKSUMS_KEY,
    STAMPS_KEY,
    checksum_sources,
    stamp_sources,
)
from vlbench.data.data_sources import SourceCache, open_held_out, open_stage_sources
from vlbench.data.sample import SampleSource
from vlbench.errors import UserError
from vlbench.train.resume import load_recipe_with_init
from vlbench.train.run_folder import RunFolder, recipe_differences


def refuse_other_recipes(jobs: Sequence[TrainingJob]) -> None:
    """Refuse folders of runs that were begun with another recipe or connector.

    They would count as runs of these jobs.
    """
    for job in jobs:
        saved = RunFolder(job.folder).recipe_file
        if not saved.is_file():
            continue
        recipe = load_recipe_with_init(list(job.overrides))
        changed = recipe_differences(recipes.load_recipe_file(saved), recipe)
        if changed:
            raise UserError(
                f"{job.folder} was trained with another recipe; it differs in "
                f"{', '.join(changed)}. Give a new folder, run=DIR, or repeat the command that "
                "made this one"
            )
        _refuse_other_source(recipe, job.folder)


def refuse_edited_row(grid: ComparisonGrid, row: GridRow, seed: int) -> None:
    """Refuse to train a row whose files were edited since the comparison began."""
    recipe = load_recipe(row, seed)
    changed = recipe_differences(grid.recipe_of(row, seed), recipe)
    if changed:
        raise UserError(
            "its recipe is not what it was when the comparison began; it differs in "
            f"{', '.join(changed)}. Put the file back and repeat the command"
        )
    folders = [grid.run_folder(row, other) for other in grid.seeds]
    begun = [folder for folder in folders if (folder / "recipe.yaml").is_file()]
    for folder in begun:
        _refuse_other_source(recipe, folder)
    if begun:
        _refuse_other_data(recipe, begun[0])


def _refuse_other_source(recipe: Recipe, run_folder: Path) -> None:
    if difference := describe_other_source(recipe.connector, run_folder):
        raise UserError(
            f"{run_folder} was trained with another connector: {difference}. Put the kept file "
            "back, or give a new folder, run=DIR"
        )


def _refuse_other_data(recipe: Recipe, run_folder: Path) -> None:
    """Refuse data that hold other records than when a run of the row began.

    Files of the same size and time are taken to be the same.
    """
    versions = RunFolder(run_folder).read_versions()
    recorded, stamps = (versions.get(key) or {} for key in (CHECKSUMS_KEY, STAMPS_KEY))
    opened: SourceCache = {}
    sources = {
        source.name: source
        for data in (*recipe.selected_data, recipe.last_stage_data)
        for source in _open_sources(data, opened)
    }
    now = stamp_sources(sources.values())
    edited = [
        source
        for name, source in sources.items()
        if name in recorded and stamps.get(name, ()) != now.get(name)
    ]
    for name, found in checksum_sources(edited).items():
        if found != recorded[name]:
            raise UserError(
                f"{name} holds other data than when {run_folder} began (checksum {found[:12]}, "
                f"not {recorded[name][:12]}). Put the old data back, or give a new folder, run=DIR"
            )


def _open_sources(data: StageData, opened: SourceCache) -> list[SampleSource]:
    """Return the sources that a stage trains on, and the held-out one of the user's."""
    held_out = open_held_out(data, opened) if data.config.val else None
    sources = [source for source, _ in open_stage_sources(data, opened)]
    return [*sources, held_out] if held_out else sources


def refuse_renamed_rows(grid: ComparisonGrid) -> None:
    """Refuse a new row whose runs are in the folder already, under another name.

    A row is named by what differs from the others, so that one more row may rename all.
    """
    names = {identity_text(grid.recipes[row.name]): row.name for row in grid.rows}
    folders = {grid.folder / row.name for row in grid.rows}
    for file in files_below(grid.folder, "recipe.yaml"):
        folder = file.parent.parent
        is_run = file.parent.name.startswith("seed") and (file.parent / "checkpoints").is_dir()
        if not is_run or folder in folders or is_trial(file.parent):
            continue
        name = ""
        with contextlib.suppress(UserError):  # of another version: it cannot be gone on with
            name = names.get(identity_text(recipes.load_recipe_file(file)), "")
        if name and not any((grid.folder / name).glob("seed*/recipe.yaml")):
            raise UserError(
                f"row {name} has the recipe of the runs in {folder}: a row is named by what "
                f"differs from the others, and that has changed. Rename {folder} to "
                f"{grid.folder / name}, so that its runs count, or give a new folder, run=DIR"
            )
