"""Leading stages that two rows have in common are trained once: the later run copies them."""

from __future__ import annotations

import contextlib
import shutil
from typing import Any

from vlbench.compare.experiment import grid as grids
from vlbench.compare.experiment.grid import ComparisonGrid, GridRow
from vlbench.config import recipe as recipes
from vlbench.config.schema import Recipe
from vlbench.file_lock import LOCK_FILE, is_held_here
from vlbench.train.run_folder import RunFolder, open_run

STAGE_IGNORED_KEYS = ("run", "trainer", "log", "only", "from", "dry_run", "profile", "recipe")
"""Top-level recipe keys that do not change what a stage learns."""


def find_shared_stages(
    grid: ComparisonGrid, row: GridRow, seed: int
) -> tuple[GridRow, list[str]] | None:
    """Return an earlier row whose first stages are the same with this seed, and their names."""
    own = grids.load_recipe(row, seed)
    for other in grid.rows[: grid.rows.index(row)]:
        stages = common_stages(own, grids.load_recipe(other, seed))
        if stages:
            return other, stages
    return None


def common_stages(first: Recipe, second: Recipe) -> list[str]:
    """Return the names of the leading stages that two recipes train alike; never all stages."""
    first_keys = recipes.flatten_keys(recipes.to_plain(first))
    second_keys = recipes.flatten_keys(recipes.to_plain(second))

    def keys_outside_stages(recipe: dict[str, Any]) -> dict[str, Any]:
        ignored = (*STAGE_IGNORED_KEYS, "stages")
        return {key: value for key, value in recipe.items() if key.split(".")[0] not in ignored}

    def keys_of_stage(recipe: dict[str, Any], stage: str) -> dict[str, Any]:
        return {k: v for k, v in recipe.items() if k.startswith(f"stages.{stage}.")}

    names = list(first.stages)
    if names != list(second.stages):
        return []
    if keys_outside_stages(first_keys) != keys_outside_stages(second_keys):
        return []
    common: list[str] = []
    for name in names[:-1]:
        if keys_of_stage(first_keys, name) != keys_of_stage(second_keys, name):
            break
        common.append(name)
    return common


def copy_shared_stages(grid: ComparisonGrid, row: GridRow, seed: int) -> str:
    """Copy the checkpoints of shared stages into a new run; return which, "" for none."""
    folder, shared = grid.run_folder(row, seed), find_shared_stages(grid, row, seed)
    if shared is None or (folder / "recipe.yaml").is_file():
        return ""
    other, stages = shared
    source = RunFolder(grid.run_folder(other, seed))
    if not source.is_finished or is_held_here(folder / LOCK_FILE):  # fit says by whom
        return ""
    recipe = recipes.load_recipe([*row.overrides_for_seed(seed), f"run={folder}"])
    with contextlib.ExitStack() as held_locks:
        run = open_run(recipe, held_locks)
        for number, name in enumerate(stages):
            for checkpoint in sorted(source.checkpoints_folder.glob(f"{number}-{name}-*"))[-1:]:
                writing = run.checkpoints_folder / f".writing-{checkpoint.name}"
                shutil.copytree(checkpoint, writing)
                recipes.save_recipe(recipe, writing / "recipe.yaml")
                writing.rename(run.checkpoints_folder / checkpoint.name)
        shutil.copy(source.folder / "metrics.csv", run.folder / "metrics.csv")
    return f"{', '.join(stages)} as in {other.name}"
