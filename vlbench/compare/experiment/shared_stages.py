"""Leading stages that two rows have in common are trained once: the later run copies them."""

from __future__ import annotations

import contextlib
import shutil
from typing import Any

from vlbench.command_line.overrides import flatten_keys
from vlbench.compare.experiment.grid import ComparisonGrid, GridRow
from vlbench.compare.report.row_identity import STAGES_KEY, row_identity, stages_that_ran
from vlbench.config import recipe as recipes
from vlbench.config.schema import Recipe
from vlbench.data.data_checksums import DATA_KEYS
from vlbench.file_lock import LOCK_FILE, is_held_here
from vlbench.train.resume import load_recipe_with_init
from vlbench.train.run_folder import RunFolder, open_run


def find_shared_stages(
    grid: ComparisonGrid, row: GridRow, seed: int
) -> tuple[GridRow, list[str]] | None:
    """Return an earlier row whose first stages are the same with this seed, and their names."""
    own = load_recipe_with_init(row.overrides_for_seed(seed))
    for other in grid.rows[: grid.rows.index(row)]:
        stages = common_stages(own, load_recipe_with_init(other.overrides_for_seed(seed)))
        if stages:
            return other, stages
    return None


def common_stages(first: Recipe, second: Recipe) -> list[str]:
    """Return the names of the leading stages that two recipes train alike; never all of `first`.

    They are alike to the last bit, so that what else changes rounding is the same, too.
    """
    own, other = (flatten_keys(recipes.to_plain(recipe)) for recipe in (first, second))
    if _keys_outside_stages(own) != _keys_outside_stages(other):
        return []
    common: list[str] = []
    for name, other_name in zip(stages_that_ran(own)[:-1], stages_that_ran(other), strict=False):
        if name != other_name or _keys_of_stage(own, name) != _keys_of_stage(other, name):
            break
        common.append(name)
    return common


def _keys_outside_stages(recipe: dict[str, Any]) -> dict[str, Any]:
    identity = row_identity(recipe, {}).items()
    rounding = {key: recipe[key] for key in ("seed", "activation_checkpointing")}
    return {k: v for k, v in identity if k.split(".")[0] not in ("stages", STAGES_KEY)} | rounding


def _keys_of_stage(recipe: dict[str, Any], stage: str) -> dict[str, Any]:
    return {k: v for k, v in recipe.items() if k.startswith(f"stages.{stage}.")}


def copy_shared_stages(grid: ComparisonGrid, row: GridRow, seed: int) -> str:
    """Copy the checkpoints of shared stages into a new run; return which, "" for none."""
    folder, shared = grid.run_folder(row, seed), find_shared_stages(grid, row, seed)
    if shared is None or (folder / "recipe.yaml").is_file():
        return ""
    other, stages = shared
    source = RunFolder(grid.run_folder(other, seed))
    if not source.is_finished or is_held_here(folder / LOCK_FILE):  # fit says by whom
        return ""
    # as `fit` resolves it: what it finds in the folder it does not look up in `init` again
    recipe = load_recipe_with_init([*row.overrides_for_seed(seed), f"run={folder}"])
    with contextlib.ExitStack() as held_locks:
        run = open_run(recipe, held_locks)
        for number, name in enumerate(stages):
            for checkpoint in sorted(source.checkpoints_folder.glob(f"{number}-{name}-*"))[-1:]:
                writing = run.checkpoints_folder / f".writing-{checkpoint.name}"
                shutil.copytree(checkpoint, writing)
                recipes.save_recipe(recipe, writing / "recipe.yaml")
                writing.rename(run.checkpoints_folder / checkpoint.name)
        recorded = source.read_versions()  # of the data that the shared stages trained on
        run.record_versions({key: recorded[key] for key in DATA_KEYS if key in recorded})
        shutil.copy(source.folder / "metrics.csv", run.folder / "metrics.csv")
    return f"{', '.join(stages)} as in {other.name}"
