"""Leading stages that two rows have in common are trained once: the later run copies them."""

from __future__ import annotations

import contextlib
import json
import shutil
from typing import Any, NamedTuple

from vlbench.command_line.overrides import flatten_keys
from vlbench.compare.experiment.grid import ComparisonGrid, GridRow
from vlbench.compare.report.row_identity import STAGES_KEY, row_identity, stages_that_ran
from vlbench.config import recipe as recipes
from vlbench.config.schema import Recipe
from vlbench.connector.kept_source import describe_other_source
from vlbench.data.data_checksums import DATA_KEYS
from vlbench.file_lock import LOCK_FILE, is_held_here
from vlbench.train.resume import load_recipe_with_init
from vlbench.train.run_folder import RunFolder, open_run


class SharedStages(NamedTuple):
    """Leading stages that a row has in common with an earlier one."""

    row: GridRow
    """The earlier row, which trains them."""
    stages: list[str]


def find_shared_stages(grid: ComparisonGrid) -> dict[str, SharedStages]:
    """Return name of a row -> the first earlier row whose first stages are the same, and these.

    Rows without one are left out. It is the same for every seed.
    """
    found: dict[str, SharedStages] = {}
    first_rows: dict[str, GridRow] = {}
    whole = {row.name: _recipe_with_init(grid, row) for row in grid.rows}
    for row in grid.rows:
        recipe = flatten_keys(recipes.to_plain(whole[row.name]))
        ran = stages_that_ran(recipe)
        if not ran:
            continue
        beginning = [_keys_outside_stages(recipe), ran[0], _keys_of_stage(recipe, ran[0])]
        other = first_rows.setdefault(json.dumps(beginning, sort_keys=True), row)
        stages = common_stages(whole[row.name], whole[other.name])
        if other is not row and stages:
            found[row.name] = SharedStages(other, stages)
    return found


def _recipe_with_init(grid: ComparisonGrid, row: GridRow) -> Recipe:
    """Return the recipe of a row with what it leaves open as in its `init`.

    A run that has begun tells that itself: its `init` may be gone.
    """
    if not grid.recipes[row.name].init:
        return grid.recipes[row.name]
    seed = grid.seeds[0]
    words = [*row.overrides_for_seed(seed), f"run={grid.run_folder(row, seed)}"]
    return load_recipe_with_init(words)


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


def copy_shared_stages(
    grid: ComparisonGrid, row: GridRow, seed: int, shared: SharedStages | None
) -> str:
    """Copy the checkpoints of shared stages into a new run; return which, "" for none."""
    folder = grid.run_folder(row, seed)
    if shared is None or (folder / "recipe.yaml").is_file():
        return ""
    source = RunFolder(grid.run_folder(shared.row, seed))
    if not source.is_finished or is_held_here(folder / LOCK_FILE):  # fit says by whom
        return ""
    # as `fit` resolves it: what it finds in the folder it does not look up in `init` again
    recipe = load_recipe_with_init([*row.overrides_for_seed(seed), f"run={folder}"])
    stages = _trained_alike(recipe, source)
    if not stages:
        return ""
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
    return f"{', '.join(stages)} as in {shared.row.name}"


def _trained_alike(recipe: Recipe, source: RunFolder) -> list[str]:
    """Return the leading stages that a run has trained as a recipe says, by what the run kept.

    The files of its recipe and of its connector may have been edited since it began.
    """
    if describe_other_source(recipe.connector, source.folder):
        return []
    return common_stages(recipe, recipes.load_recipe_file(source.recipe_file))
