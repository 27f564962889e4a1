"""What a comparison will take, printed before it starts: its runs, their time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from vlbench.compare.experiment import design_power, lr_sweep, task_jobs
from vlbench.compare.experiment.comparison_folder import PROBE_FILE
from vlbench.compare.experiment.design_cautions import (
    describe_design_cautions,
    describe_probe_cautions,
    describe_seeds,
)
from vlbench.compare.experiment.grid import ComparisonGrid, GridRow
from vlbench.compare.experiment.run_jobs import count_run_gpus, count_slots, slot_environment
from vlbench.compare.experiment.shared_stages import find_shared_stages
from vlbench.compare.experiment.task_jobs import PlannedTask
from vlbench.compare.report.sweep_summary import SWEEP_SEED
from vlbench.text_files import read_json, split_lines, write_atomically
from vlbench.train.run_folder import RunFolder
from vlbench.train.run_report import format_bytes, format_duration, print_status
from vlbench.train.run_results_file import read_results


def print_plan(grid: ComparisonGrid, tasks: Sequence[PlannedTask] = ()) -> None:
    """Print the runs, how many are finished, and what the others and their tasks will take."""
    count = len(grid.rows) * len(grid.seeds)
    done = sum(RunFolder(folder).is_finished for folder in grid.run_folders())
    print(
        f"comparison in {grid.folder}: {len(grid.rows)} rows x {len(grid.seeds)} seeds = {count} "
        f"runs, {done} of them finished"
    )
    for row in grid.rows:
        recipe = grid.recipes[row.name]
        steps = ", ".join(
            f"{name} {stage.steps if stage.steps is not None else f'{stage.epochs} epochs'}"
            for name, stage in recipe.stages.items()
        )
        print(f"  {row.name}: connector {recipe.connector['name']}; steps: {steps}")
    trials = lr_sweep.list_trials(grid)
    if trials:
        tried = " and ".join(
            f"its {part}'s learning rate x {', '.join(f'{factor:g}' for factor in factors)}"
            for part, factors in grid.lr_factors.items()
        )
        print(
            f"  before them {len(grid.rows) * len(trials)} runs with seed {SWEEP_SEED}: every row "
            f"tries {tried}"
        )
    shared = len(find_shared_stages(grid)) * len(grid.seeds)
    if shared and grid.jobs != "slurm":
        print(f"  {shared} runs begin with stages that another one has trained alike")
    print(f"  {describe_seeds(grid)}")
    for caution in describe_design_cautions(grid):
        print(f"  caution: {caution}")
    print(*design_power.describe_power(grid), sep="\n", end="\n" if len(grid.rows) > 1 else "")
    question_seconds = None
    if done < count and grid.jobs != "slurm":  # a login node must not train
        question_seconds = _print_costs(grid)
    for line in task_jobs.describe_tasks(tasks, grid.run_folders(), question_seconds):
        print(line, flush=True)


def _print_costs(grid: ComparisonGrid) -> float | None:
    """Print the time and memory that the unfinished runs will take.

    Returns the seconds that one of their own questions takes, None where that was not tried.
    """
    print("  trying some steps of every row ...", flush=True)
    costs = _estimate_costs(grid)
    seconds, memory = 0.0, 0
    for row, cost in zip(grid.rows, costs, strict=True):
        if cost is None:
            continue
        left = sum(not RunFolder(grid.run_folder(row, seed)).is_finished for seed in grid.seeds)
        left += sum(
            not RunFolder(lr_sweep.trial_folder(grid, row, factors)).is_finished
            for factors in lr_sweep.list_trials(grid)
        )
        seconds += left * cost["seconds"]
        memory = max(memory, cost["memory"])
        print(
            f"  {row.name}: {left} runs to go, {format_duration(cost['seconds'])} and "
            f"{format_bytes(cost['memory'])} each"
        )
        for caution in describe_probe_cautions(row.name, cost):
            print(f"  caution: {caution}")
    slot_count = count_slots(grid.jobs, count_run_gpus(list(grid.recipes.values())))
    print(
        f"  about {format_duration(seconds / slot_count)} in all with jobs={slot_count}, at most "
        f"{format_bytes(memory)} of memory for each of {slot_count}",
        flush=True,
    )
    tried = [cost["question_seconds"] for cost in costs if cost and cost.get("question_seconds")]
    return mean(tried) if tried else None


def _estimate_costs(grid: ComparisonGrid) -> Sequence[dict[str, Any] | None]:
    """Return `seconds` and `memory` (bytes) of a run of every row, None where a probe failed.

    Finished runs are averaged; a row without one is probed for some steps, once per comparison.
    """
    file = grid.folder / PROBE_FILE
    probes = _read_probes(file)
    run_gpus = count_run_gpus(list(grid.recipes.values()))
    environment = slot_environment(0, count_slots(grid.jobs, run_gpus), run_gpus)
    costs = []
    for row in grid.rows:
        overrides = row.overrides_for_seed(grid.seeds[0])
        cost = _finished_run_cost(grid, row)
        if cost is None and probes.get(row.name, {}).get("words") != overrides:
            probes[row.name] = {
                "words": overrides,
                **(_probe_run(row, overrides, environment) or {}),
            }
        probe = probes.get(row.name, {})
        costs.append(cost or (probe if "seconds" in probe else None))
    if not grid.dry_run:
        write_atomically(file, json.dumps(probes, indent=1))
    return costs


def _read_probes(file: Path) -> dict[str, dict[str, Any]]:
    """Return what was probed before, by row; entries that are no probes are left out."""
    probes = read_json(file) if file.is_file() else {}
    return {
        name: probe
        for name, probe in probes.items()
        if isinstance(probe, dict) and isinstance(probe.get("words"), list)
    }


def _finished_run_cost(grid: ComparisonGrid, row: GridRow) -> dict[str, Any] | None:
    """Return the mean time and peak memory of a row's finished runs, None if there are none."""
    runs = [RunFolder(grid.run_folder(row, seed)) for seed in grid.seeds]
    results = [read_results(run.results_file) for run in runs if run.is_finished]
    if not results:
        return None
    return {
        "seconds": mean(result.get("seconds") or 0 for result in results),
        "memory": max(result.get("peak_memory_bytes") or 0 for result in results),
    }


def _probe_run(
    row: GridRow, overrides: Sequence[str], environment: Mapping[str, str]
) -> dict[str, Any] | None:
    """Return the cost of a run, from a few steps; None where they fail, the reason printed."""
    process = subprocess.run(
        [sys.executable, "-m", "vlbench.compare.experiment.probe_run", *overrides],
        env=environment,
        capture_output=True,
        text=True,
    )
    if process.returncode:
        reason = (split_lines(process.stderr.strip()) or ["no output"])[-1]
        print_status(f"  {row.name}: cannot be run: {reason.removeprefix('vlbench: ')}")
        return None
    cost: dict[str, Any] = json.loads(split_lines(process.stdout)[-1])
    return cost
