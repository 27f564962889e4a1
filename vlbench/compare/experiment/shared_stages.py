"""Stages that two runs of a comparison train alike are trained once: the later run gets them."""

from __future__ import annotations

import shutil
from typing import Any

from vlbench.compare.experiment import grid as grids
from vlbench.compare.experiment.grid import ComparisonGrid, GridRow
from vlbench.config import recipe as recipes
from vlbench.config.merge import flatten_keys
from vlbench.config.schema import Recipe
from vlbench.train.run_folder import RunFolder, open_run

STAGE_IGNORED_KEYS = ("run", "trainer", "log", "only", "from", "dry_run", "profile", "recipe")
"""Keys that change nothing in what a stage learns."""


def find_shared_stages(
    grid: ComparisonGrid, row: GridRow, seed: int
) -> tuple[GridRow, list[str]] | None:
    """Return an earlier row that begins alike with this seed, and the stages that are alike."""
    own = grids.load_recipe(row, seed)
    for other in grid.rows[: grid.rows.index(row)]:
        stages = common_stages(own, grids.load_recipe(other, seed))
        if stages:
            return other, stages
    return None


def common_stages(first: Recipe, second: Recipe) -> list[str]:
    """Return the first stages that two recipes train alike; never all of them."""
    ours, theirs = flatten_keys(recipes.to_plain(first)), flatten_keys(recipes.to_plain(second))

    def other_keys(recipe: dict[str, Any]) -> dict[str, Any]:
        return {
            k: v
            for k, v in recipe.items()
            if k.split(".")[0] not in (*STAGE_IGNORED_KEYS, "stages")
        }

    names = list(first.stages)
    if names != list(second.stages) or other_keys(ours) != other_keys(theirs):
        return []
    found: list[str] = []
    for name in names[:-1]:
        start = f"stages.{name}."
        stage = {k: v for k, v in ours.items() if k.startswith(start)}
        if stage != {k: v for k, v in theirs.items() if k.startswith(start)}:
            break
        found.append(name)
    return found


def copy_shared_stages(grid: ComparisonGrid, row: GridRow, seed: int) -> str:
    """Give a new run the stages that a finished one has trained alike; say which, "" for none."""
    folder, found = grid.run_folder(row, seed), find_shared_stages(grid, row, seed)
    if found is None or (folder / "recipe.yaml").is_file():
        return ""
    other, stages = found
    source = RunFolder(grid.run_folder(other, seed))
    if not source.is_finished:
        return ""
    recipe = recipes.load_recipe([*row.overrides_for_seed(seed), f"run={folder}"])
    run = open_run(recipe)
    for number, name in enumerate(stages):
        for checkpoint in sorted(source.checkpoints_folder.glob(f"{number}-{name}-*"))[-1:]:
            shutil.copytree(checkpoint, run.checkpoints_folder / checkpoint.name)
            recipes.save_recipe(recipe, run.checkpoints_folder / checkpoint.name / "recipe.yaml")
    shutil.copy(source.folder / "metrics.csv", run.folder / "metrics.csv")
    return f"{', '.join(stages)} as in {other.name}"
