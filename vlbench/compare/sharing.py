"""Stages that two runs of a comparison train alike are trained once: the later run gets them."""

from __future__ import annotations

import shutil
from typing import Any

from vlbench import recipe as recipes
from vlbench.compare import grid as grids
from vlbench.compare.grid import Grid, Row
from vlbench.layers import flat, plain
from vlbench.schema import Recipe
from vlbench.train.run import Run, open_run

FREE = ("run", "trainer", "log", "only", "from", "dry_run", "profile", "recipe")
"""Keys that change nothing in what a stage learns."""


def partner(grid: Grid, row: Row, seed: int) -> tuple[Row, list[str]] | None:
    """Return an earlier row that begins alike with this seed, and the stages that are alike."""
    own = grids.load(row, seed)
    for other in grid.rows[: grid.rows.index(row)]:
        stages = alike(own, grids.load(other, seed))
        if stages:
            return other, stages
    return None


def alike(one: Recipe, other: Recipe) -> list[str]:
    """Return the first stages that two recipes train alike; never all of them."""
    ours, theirs = flat(plain(one)), flat(plain(other))

    def rest(recipe: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in recipe.items() if k.split(".")[0] not in (*FREE, "stages")}

    names = list(one.stages)
    if names != list(other.stages) or rest(ours) != rest(theirs):
        return []
    found: list[str] = []
    for name in names[:-1]:
        start = f"stages.{name}."
        stage = {k: v for k, v in ours.items() if k.startswith(start)}
        if stage != {k: v for k, v in theirs.items() if k.startswith(start)}:
            break
        found.append(name)
    return found


def share(grid: Grid, row: Row, seed: int) -> str:
    """Give a new run the stages that a finished one has trained alike; say which, "" for none."""
    folder, found = grid.run_folder(row, seed), partner(grid, row, seed)
    if found is None or (folder / "recipe.yaml").is_file():
        return ""
    other, stages = found
    source = Run(grid.run_folder(other, seed))
    if not source.finished:
        return ""
    recipe = recipes.load([*row.of_seed(seed), f"run={folder}"])
    run = open_run(recipe)
    for number, name in enumerate(stages):
        for checkpoint in sorted(source.checkpoints.glob(f"{number}-{name}-*"))[-1:]:
            shutil.copytree(checkpoint, run.checkpoints / checkpoint.name)
            recipes.save(recipe, run.checkpoints / checkpoint.name / "recipe.yaml")
    shutil.copy(source.folder / "metrics.csv", run.folder / "metrics.csv")
    return f"{', '.join(stages)} as in {other.name}"
