"""`python -m vlbench compare`: train every run of a grid, then report. The folder says everything.

A finished run is not repeated, an interrupted one goes on, a failed one is named and does not sink
the rest. Stages that are alike in recipe, seed and what came before are trained once.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from vlbench.compare import grid as grids
from vlbench.compare import plan, sweep
from vlbench.compare.findings import find
from vlbench.compare.grid import Grid, Row
from vlbench.compare.jobs import STOPPED, Job, Stopped, slots, slurm, train
from vlbench.compare.markdown import markdown
from vlbench.compare.match import matched
from vlbench.compare.report import write
from vlbench.compare.runs import load
from vlbench.compare.sharing import partner, share
from vlbench.files import read_json, write_whole
from vlbench.mistakes import Mistake
from vlbench.train.machine import check_runs
from vlbench.train.report import duration, say
from vlbench.train.run import Run

REPORTS = ("report.md", "report.html")


def run_grid(grid: Grid) -> int:
    """Run every run of `grid` that is not finished, and report; return the exit code."""
    _check_machine(grid)
    grid = matched(grid)
    if grid.dry_run:
        plan.show(grid)
        return 0
    _record(grid)
    plan.show(grid)
    if grid.jobs == "slurm":
        return _for_slurm(grid)
    try:
        failed = _train(grid, sweep.trials(grid))
        if grid.sweep:
            grid = sweep.chosen(grid)
        failed |= _train(grid, _jobs(grid))
    except Stopped:
        say(f"stopped, saved. To go on: repeat the command with run={grid.folder}")
        return STOPPED
    return _finish(grid, failed)


def _check_machine(grid: Grid) -> None:
    """Refuse runs that are too much for this machine, where there are some to be trained here."""
    left = any(not Run(folder).finished for folder in grid.run_folders())
    if left and not grid.dry_run and grid.jobs != "slurm":
        at_once = int(grid.jobs) if grid.jobs.isdecimal() else 1
        check_runs([grids.load(row, grid.seeds[0]) for row in grid.rows], at_once)


def _record(grid: Grid) -> None:
    """Make the folder, and write down what was typed."""
    command = shlex.join(["python", "-m", "vlbench", "compare", *grid.words])
    try:
        grid.folder.mkdir(parents=True, exist_ok=True)
        write_whole(grid.folder / "command.txt", f"{command}\n")
    except OSError as error:
        raise Mistake(f"run={grid.folder} cannot be used ({error.strerror})") from error


def _jobs(grid: Grid) -> list[Job]:
    return [
        Job(f"{row.name}, seed {seed}", (*row.of_seed(seed), f"run={folder}"), folder)
        for seed in grid.seeds
        for row in grid.rows
        for folder in [grid.run_folder(row, seed)]
    ]


def _train(grid: Grid, jobs: Sequence[Job]) -> dict[Path, str]:
    """Train jobs that are not finished; return why some failed, by their folders."""
    failed: dict[Path, str] = {}
    began: dict[Job, float] = {}
    took: list[float] = []
    at_once = slots(grid.jobs)
    titles = {job: f"[{number}/{len(jobs)}] {job.title}" for number, job in enumerate(jobs, 1)}
    todo = [job for job in jobs if not Run(job.folder).finished]
    for job in jobs:
        if job not in todo:
            print(f"{titles[job]}: done before, {_accuracy(job.folder)}", flush=True)
    rows = {grid.run_folder(row, seed): (row, seed) for seed in grid.seeds for row in grid.rows}

    before = {
        job.folder: _shares_with(grid, *rows[job.folder]) for job in todo if job.folder in rows
    }

    awaited = {folder for folder in before.values() if folder}
    todo.sort(key=lambda job: job.folder not in awaited)  # or processors wait at the end

    def ready(job: Job) -> bool:
        """Tell whether no run that is to share its stages is still to come."""
        other = before.get(job.folder)
        return other is None or Run(other).finished or other in failed

    def start(job: Job) -> None:
        shared = share(grid, *rows[job.folder]) if job.folder in rows else ""
        also = f"{shared}; " if shared else ""
        print(f"{titles[job]}: {also}trains, log in {job.log}", flush=True)
        began[job] = time.monotonic()

    def end(job: Job, code: int) -> None:
        took.append(time.monotonic() - began[job])
        if code:
            failed[job.folder] = job.last_line
            say(f"{titles[job]}: failed: {failed[job.folder]}")
            return
        left = mean(took) * (len(todo) - len(took)) / at_once
        print(f"{titles[job]}: {_accuracy(job.folder)}; about {duration(left)} left", flush=True)

    train(todo, at_once, ready, start, end)
    return failed


def _shares_with(grid: Grid, row: Row, seed: int) -> Path | None:
    """Return the folder of the run that trains stages which this one can take over."""
    found = partner(grid, row, seed)
    return grid.run_folder(found[0], seed) if found else None


def _for_slurm(grid: Grid) -> int:
    """Write the script of what is to be run next, and say what to do with it."""
    trials = [job for job in sweep.trials(grid) if not Run(job.folder).finished]
    if grid.sweep and not trials:
        grid = sweep.chosen(grid)
    todo = trials or [job for job in _jobs(grid) if not Run(job.folder).finished]
    if not todo:
        return _finish(grid, {})
    script = slurm(todo, grid.folder)
    print(f"sbatch {script}  # {len(todo)} runs, one GPU each; then repeat this command")
    return 0


def _finish(grid: Grid, failed: dict[Path, str]) -> int:
    """Write the report of what is finished, and name what failed; return the exit code."""
    done = [load(folder) for folder in grid.run_folders() if Run(folder).finished]
    if done:
        findings = find(done, failed, sweep.told(grid.folder))
        paths = [grid.folder / name for name in REPORTS]
        for path in paths:
            write(findings, path)  # before anything is printed: the reader may be `head`
        print(f"\n{markdown(findings)}\n")
        for path in paths:
            print(f"wrote {path}")
    return 1 if failed else 0


def _accuracy(folder: Path) -> str:
    results = read_json(folder / "results.json")
    return f"accuracy {results['accuracy']:.3f} in {duration(results['seconds'])}"
