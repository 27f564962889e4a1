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

from vlbench.compare.experiment import cost_estimate, lr_sweep
from vlbench.compare.experiment import grid as grids
from vlbench.compare.experiment.grid import ComparisonGrid, GridRow
from vlbench.compare.experiment.match_budget import match_budgets
from vlbench.compare.experiment.run_jobs import (
    STOPPED_EXIT_CODE,
    ComparisonStopped,
    TrainingJob,
    count_slots,
    train_jobs,
    write_slurm_script,
)
from vlbench.compare.experiment.shared_stages import copy_shared_stages, find_shared_stages
from vlbench.compare.report.analysis import analyze_runs
from vlbench.compare.report.finished_runs import describe_sweep, load_finished_run
from vlbench.compare.report.markdown_report import render_markdown
from vlbench.compare.report.report_command import write_report
from vlbench.distributed.machine_limits import check_parallel_runs
from vlbench.errors import UserError
from vlbench.text_files import read_json, write_atomically
from vlbench.train.run_folder import RunFolder
from vlbench.train.run_report import format_duration, print_status

REPORT_FILES = ("report.md", "report.html")


def run_compare(grid: ComparisonGrid) -> int:
    """Run every run of `grid` that is not finished, and report; return the exit code."""
    _check_machine(grid)
    grid = match_budgets(grid)
    if grid.dry_run:
        cost_estimate.print_plan(grid)
        return 0
    _write_command(grid)
    cost_estimate.print_plan(grid)
    if grid.jobs == "slurm":
        return _prepare_slurm(grid)
    try:
        failed = _train_unfinished(grid, lr_sweep.trial_jobs(grid))
        if grid.lr_factors:
            grid = lr_sweep.apply_best_lr(grid)
        failed |= _train_unfinished(grid, _make_jobs(grid))
    except ComparisonStopped:
        print_status(f"stopped, saved. To go on: repeat the command with run={grid.folder}")
        return STOPPED_EXIT_CODE
    return _write_reports(grid, failed)


def _check_machine(grid: ComparisonGrid) -> None:
    """Refuse runs that are too much for this machine, where there are some to be trained here."""
    left = any(not RunFolder(folder).is_finished for folder in grid.run_folders())
    if left and not grid.dry_run and grid.jobs != "slurm":
        at_once = int(grid.jobs) if grid.jobs.isdecimal() else 1
        check_parallel_runs([grids.load_recipe(row, grid.seeds[0]) for row in grid.rows], at_once)


def _write_command(grid: ComparisonGrid) -> None:
    """Make the folder, and write down what was typed."""
    command = shlex.join(["python", "-m", "vlbench", "compare", *grid.arguments])
    try:
        grid.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(grid.folder / "command.txt", f"{command}\n")
    except OSError as error:
        raise UserError(f"run={grid.folder} cannot be used ({error.strerror})") from error


def _make_jobs(grid: ComparisonGrid) -> list[TrainingJob]:
    return [
        TrainingJob(
            f"{row.name}, seed {seed}", (*row.overrides_for_seed(seed), f"run={folder}"), folder
        )
        for seed in grid.seeds
        for row in grid.rows
        for folder in [grid.run_folder(row, seed)]
    ]


def _train_unfinished(grid: ComparisonGrid, jobs: Sequence[TrainingJob]) -> dict[Path, str]:
    """Train jobs that are not finished; return why some failed, by their folders."""
    failed: dict[Path, str] = {}
    began: dict[TrainingJob, float] = {}
    took: list[float] = []
    at_once = count_slots(grid.jobs)
    titles = {job: f"[{number}/{len(jobs)}] {job.title}" for number, job in enumerate(jobs, 1)}
    todo = [job for job in jobs if not RunFolder(job.folder).is_finished]
    for job in jobs:
        if job not in todo:
            print(f"{titles[job]}: done before, {_describe_result(job.folder)}", flush=True)
    rows = {grid.run_folder(row, seed): (row, seed) for seed in grid.seeds for row in grid.rows}

    before = {
        job.folder: _shared_run_folder(grid, *rows[job.folder])
        for job in todo
        if job.folder in rows
    }

    awaited = {folder for folder in before.values() if folder}
    todo.sort(key=lambda job: job.folder not in awaited)  # or processors wait at the end

    def is_ready(job: TrainingJob) -> bool:
        """Tell whether no run that is to share its stages is still to come."""
        other = before.get(job.folder)
        return other is None or RunFolder(other).is_finished or other in failed

    def start_job(job: TrainingJob) -> None:
        shared = copy_shared_stages(grid, *rows[job.folder]) if job.folder in rows else ""
        also = f"{shared}; " if shared else ""
        print(f"{titles[job]}: {also}trains, log in {job.log_file}", flush=True)
        began[job] = time.monotonic()

    def finish_job(job: TrainingJob, exit_code: int) -> None:
        took.append(time.monotonic() - began[job])
        if exit_code:
            failed[job.folder] = job.last_log_line
            print_status(f"{titles[job]}: failed: {failed[job.folder]}")
            return
        left = mean(took) * (len(todo) - len(took)) / at_once
        print(
            f"{titles[job]}: {_describe_result(job.folder)}; about {format_duration(left)} left",
            flush=True,
        )

    train_jobs(todo, at_once, is_ready, start_job, finish_job)
    return failed


def _shared_run_folder(grid: ComparisonGrid, row: GridRow, seed: int) -> Path | None:
    """Return the folder of the run that trains stages which this one can take over."""
    found = find_shared_stages(grid, row, seed)
    return grid.run_folder(found[0], seed) if found else None


def _prepare_slurm(grid: ComparisonGrid) -> int:
    """Write the script of what is to be run next, and say what to do with it."""
    trials = [job for job in lr_sweep.trial_jobs(grid) if not RunFolder(job.folder).is_finished]
    if grid.lr_factors and not trials:
        grid = lr_sweep.apply_best_lr(grid)
    todo = trials or [job for job in _make_jobs(grid) if not RunFolder(job.folder).is_finished]
    if not todo:
        return _write_reports(grid, {})
    script = write_slurm_script(todo, grid.folder)
    print(f"sbatch {script}  # {len(todo)} runs, one GPU each; then repeat this command")
    return 0


def _write_reports(grid: ComparisonGrid, failed: dict[Path, str]) -> int:
    """Write the report of what is finished, and name what failed; return the exit code."""
    done = [
        load_finished_run(folder) for folder in grid.run_folders() if RunFolder(folder).is_finished
    ]
    if done:
        findings = analyze_runs(done, failed, describe_sweep(grid.folder))
        paths = [grid.folder / name for name in REPORT_FILES]
        for path in paths:
            write_report(findings, path)  # before anything is printed: the reader may be `head`
        print(f"\n{render_markdown(findings)}\n")
        for path in paths:
            print(f"wrote {path}")
    return 1 if failed else 0


def _describe_result(folder: Path) -> str:
    results = read_json(folder / "results.json")
    return f"accuracy {results['accuracy']:.3f} in {format_duration(results['seconds'])}"
