"""The plan of a comparison, before it starts: its runs, and the time and memory they will take."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from statistics import mean
from typing import Any

from vlbench.compare import grid as grids
from vlbench.compare import sweep
from vlbench.compare.grid import Grid, Row
from vlbench.compare.jobs import environment, slots
from vlbench.compare.sharing import partner
from vlbench.files import lines_of, read_json, write_whole
from vlbench.train.report import duration, say, size_of
from vlbench.train.run import Run

PROBED = "plan.json"


def show(grid: Grid) -> None:
    """Print what will be run, what there is already, and what the rest will take."""
    count = len(grid.rows) * len(grid.seeds)
    done = sum(Run(folder).finished for folder in grid.run_folders())
    print(
        f"comparison in {grid.folder}: {len(grid.rows)} rows x {len(grid.seeds)} seeds = {count} "
        f"runs, {done} of them finished"
    )
    for row in grid.rows:
        recipe = grids.load(row, grid.seeds[0])
        steps = ", ".join(
            f"{name} {stage.steps if stage.steps is not None else f'{stage.epochs} epochs'}"
            for name, stage in recipe.stages.items()
        )
        print(f"  {row.name}: connector {recipe.connector['name']}; steps: {steps}")
    if grid.sweep:
        tried = ", ".join(f"{factor:g}" for factor in grid.sweep)
        print(
            f"  before them {len(grid.rows) * len(grid.sweep)} runs with seed {sweep.seed(grid)}: "
            f"every row tries its connector's learning rate x {tried}"
        )
    shared = sum(partner(grid, row, seed) is not None for seed in grid.seeds for row in grid.rows)
    if shared and grid.jobs != "slurm":
        print(f"  {shared} runs begin with stages that another one has trained alike")
    if done < count and grid.jobs != "slurm":  # where Slurm is called, nothing is trained
        _show_costs(grid)


def _show_costs(grid: Grid) -> None:
    """Say how long the runs that are not finished will take, and how much memory."""
    print("  trying some steps of every row ...", flush=True)
    costs = _costs(grid)
    seconds, memory = 0.0, 0
    for row, cost in zip(grid.rows, costs, strict=True):
        if cost is None:
            continue
        left = sum(not Run(grid.run_folder(row, seed)).finished for seed in grid.seeds)
        left += sum(not Run(sweep.folder(grid, row, factor)).finished for factor in grid.sweep)
        seconds += left * cost["seconds"]
        memory = max(memory, cost["memory"])
        print(
            f"  {row.name}: {left} runs to go, {duration(cost['seconds'])} and "
            f"{size_of(cost['memory'])} each"
        )
    at_once = slots(grid.jobs)
    print(
        f"  about {duration(seconds / at_once)} in all with jobs={at_once}, at most "
        f"{size_of(memory)} of memory for each of {at_once}",
        flush=True,
    )


def _costs(grid: Grid) -> Sequence[dict[str, Any] | None]:
    """Return `seconds` and `memory` of a run of every row, None where it could not be found out.

    A finished run tells it best; otherwise some steps are tried, once for a comparison.
    """
    file = grid.folder / PROBED
    known = read_json(file) if file.is_file() else {}
    found = []
    for row in grid.rows:
        words = row.of_seed(grid.seeds[0])
        cost = _finished(grid, row)
        if cost is None and known.get(row.name, {}).get("words") != words:
            known[row.name] = {"words": words, **(_probe(row, words, slots(grid.jobs)) or {})}
        probed = known.get(row.name, {})
        found.append(cost or (probed if "seconds" in probed else None))
    if not grid.dry_run:
        write_whole(file, json.dumps(known, indent=1))
    return found


def _finished(grid: Grid, row: Row) -> dict[str, Any] | None:
    """Return what the finished runs of a row took, None if there is none."""
    runs = [Run(grid.run_folder(row, seed)) for seed in grid.seeds]
    results = [read_json(run.results_file) for run in runs if run.finished]
    if not results:
        return None
    return {
        "seconds": mean(one["seconds"] for one in results),
        "memory": max(one["peak_memory_bytes"] for one in results),
    }


def _probe(row: Row, words: Sequence[str], at_once: int) -> dict[str, Any] | None:
    """Return what a run takes by a few of its steps; None, and the reason said, if they fail."""
    tried = subprocess.run(
        [sys.executable, "-m", "vlbench.compare.probe", *words],
        env=environment(0, at_once),
        capture_output=True,
        text=True,
    )
    if tried.returncode:
        reason = (lines_of(tried.stderr.strip()) or ["no output"])[-1]
        say(f"  {row.name}: cannot be run: {reason.removeprefix('vlbench: ')}")
        return None
    return json.loads(lines_of(tried.stdout)[-1])
