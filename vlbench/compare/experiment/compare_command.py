"""`python -m vlbench compare`: train every run of a grid, then report.

The state is in the comparison's folder alone: a finished run is not repeated, an interrupted one is
resumed, a failed one is reported and does not stop the others. Leading stages that two rows have in
common are trained once.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean

from vlbench.compare.experiment import cost_estimate, lr_sweep, task_jobs
from vlbench.compare.experiment.begun_runs import (
    refuse_edited_row,
    refuse_other_recipes,
    refuse_renamed_rows,
)
from vlbench.compare.experiment.budget_curves import expand_curves
from vlbench.compare.experiment.comparison_folder import (
    COMMAND_FILE,
    check_comparison_folder,
)
from vlbench.compare.experiment.comparison_report import NO_RESULTS, write_reports
from vlbench.compare.experiment.equal_rows import refuse_equal_rows, refuse_equal_trials
from vlbench.compare.experiment.grid import ComparisonGrid, GridRow
from vlbench.compare.experiment.match_budget import match_budgets
from vlbench.compare.experiment.run_jobs import (
    STOPPED_EXIT_CODE,
    ComparisonStopped,
    TrainingJob,
    count_run_gpus,
    count_slots,
    train_jobs,
)
from vlbench.compare.experiment.shared_stages import (
    SharedStages,
    copy_shared_stages,
    find_shared_stages,
)
from vlbench.compare.experiment.slurm_array import write_slurm_script
from vlbench.compare.experiment.task_jobs import PlannedTask
from vlbench.compare.report.curve_plan import write_curve_plan
from vlbench.compare.report.sweep_summary import describe_sweep
from vlbench.config import recipe as recipes
from vlbench.distributed.launcher import ORPHAN_GRACE_SECONDS
from vlbench.distributed.machine_limits import check_parallel_runs
from vlbench.errors import UserError
from vlbench.file_lock import LOCK_FILE, hold_folder, is_held_here
from vlbench.system_errors import explain_unwritable
from vlbench.text_files import write_atomically
from vlbench.train.run_folder import RunFolder
from vlbench.train.run_report import format_duration, print_status
from vlbench.train.run_results_file import read_results


def run_compare(grid: ComparisonGrid) -> int:
    """Train the unfinished runs of a grid and write the reports; return the exit code."""
    check_comparison_folder(grid.folder)
    has_curves = grid.curve is not None
    if not has_curves:  # before sizes are solved, which takes seconds
        _check_machine(grid)
    grid = expand_curves(match_budgets(grid))
    _refuse_rows_made_equal(grid)
    if has_curves:  # only now the rows are those that have runs: finished ones need nothing
        _check_machine(grid)
    tasks = task_jobs.plan_tasks(grid)
    refuse_renamed_rows(grid)
    refuse_other_recipes([*lr_sweep.trial_jobs(grid), *_make_jobs(lr_sweep.settled_grid(grid))])
    if grid.dry_run:
        cost_estimate.print_plan(grid, tasks)
        return 0
    with _hold_grid_folder(grid):
        _write_command(grid)
        if not grid.lr_factors:
            lr_sweep.forget_unused_choices(grid)
        if grid.curve_plan:
            write_curve_plan(grid.curve_plan, grid.folder)
        cost_estimate.print_plan(grid, tasks)
        if grid.jobs == "slurm":
            return _prepare_slurm(grid, tasks)
        return _train_and_report(grid, tasks)


def _train_and_report(grid: ComparisonGrid, tasks: Sequence[PlannedTask]) -> int:
    """Train all unfinished runs here, ask every run its tasks, and write the reports."""
    try:
        failed = _train_unfinished(grid, lr_sweep.trial_jobs(grid))
        if grid.lr_factors:
            grid = _apply_sweep(grid)
        failed |= _train_unfinished(grid, _make_jobs(grid))
        unasked = task_jobs.ask_runs(grid, tasks)
    except ComparisonStopped:
        again = shlex.quote(f"run={grid.folder}")
        print_status(f"stopped, saved. To go on: repeat the command with {again}")
        return STOPPED_EXIT_CODE
    return write_reports(grid, failed, unasked)


def _apply_sweep(grid: ComparisonGrid) -> ComparisonGrid:
    """Return the grid with the rates that the trials found best; print what they found."""
    grid = lr_sweep.apply_best_lr(grid)
    print(*(f"  {sentence}" for sentence in _describe_sweep(grid)), sep="\n", flush=True)
    return grid


def _describe_sweep(grid: ComparisonGrid) -> list[str]:
    return describe_sweep(grid.folder, [row.name for row in grid.rows])


def _refuse_rows_made_equal(grid: ComparisonGrid) -> None:
    """Refuse rows that `match=` has made the same experiment, or that the sweep may make so.

    Points of curves are told apart by their budgets.
    """
    if grid.curve_plan is None and (grid.budget_to_match or grid.lr_factors):
        refuse_equal_rows(grid.recipes, f"match={grid.budget_to_match}")
        refuse_equal_trials(grid.recipes, lr_sweep.possible_choices(grid))


@contextlib.contextmanager
def _hold_grid_folder(grid: ComparisonGrid) -> Iterator[None]:
    """Make the comparison's folder, and let no other comparison write into it."""
    with contextlib.ExitStack() as held_locks:
        try:
            held_locks.enter_context(hold_folder(grid.folder, f"run={grid.folder}"))
        except OSError as error:
            raise explain_unwritable(error, f"run={grid.folder}") from error
        yield


def _check_machine(grid: ComparisonGrid) -> None:
    """Refuse unfinished runs that need several machines, or here more than this machine has."""
    jobs = [*lr_sweep.trial_jobs(grid), *_make_jobs(grid)]
    if all(RunFolder(job.folder).is_finished for job in jobs):
        return
    for name, recipe in grid.recipes.items():
        if recipe.trainer.num_nodes > 1:
            raise UserError(
                f"row {name}: trainer.num_nodes is {recipe.trainer.num_nodes}, and compare trains "
                "every run on one machine; trainer.devices=NUMBER takes several GPUs of it"
            )
    if not grid.dry_run and grid.jobs != "slurm":
        slot_count = int(grid.jobs) if grid.jobs.isdecimal() else 1
        check_parallel_runs(list(grid.recipes.values()), slot_count)


def _write_command(grid: ComparisonGrid) -> None:
    """Write the command into the comparison's folder."""
    command = shlex.join(["python", "-m", "vlbench", "compare", *grid.arguments])
    write_atomically(grid.folder / COMMAND_FILE, f"{command}\n")


def _make_jobs(grid: ComparisonGrid) -> list[TrainingJob]:
    return [
        TrainingJob(
            f"{row.name}, seed {seed}", (*row.overrides_for_seed(seed), f"run={folder}"), folder
        )
        for seed in grid.seeds
        for row in grid.rows
        for folder in [grid.run_folder(row, seed)]
    ]


def _is_done(job: TrainingJob) -> bool:
    """Return whether a run is finished, and has the information probes that are asked for."""
    run = RunFolder(job.folder)
    return run.is_finished and run.is_complete(
        recipes.load_recipe(list(job.overrides)).log.information_probes
    )


def _train_unfinished(grid: ComparisonGrid, jobs: Sequence[TrainingJob]) -> dict[Path, str]:
    """Train the unfinished jobs, and probe finished ones that lack it; return those that failed.

    The result is folder -> reason.
    """
    failed: dict[Path, str] = {}
    started_at = time.monotonic()
    start_times: dict[TrainingJob, float] = {}
    durations: list[float] = []
    run_gpus = count_run_gpus(list(grid.recipes.values()))
    slot_count = count_slots(grid.jobs, run_gpus)
    titles = {job: f"[{number}/{len(jobs)}] {job.title}" for number, job in enumerate(jobs, 1)}
    todo = [job for job in jobs if not _is_done(job)]
    for job in jobs:
        if job not in todo:
            print(f"{titles[job]}: done before, {_describe_result(job.folder)}", flush=True)
    rows = {grid.run_folder(row, seed): (row, seed) for seed in grid.seeds for row in grid.rows}
    shared_stages = find_shared_stages(grid)
    shared_runs = _shared_runs(grid, shared_stages)
    awaited = {shared_runs[job.folder] for job in todo if job.folder in shared_runs}
    todo.sort(key=lambda job: job.folder not in awaited)  # else slots are idle at the end
    not_ended = {job.folder for job in todo}

    def is_ready(job: TrainingJob) -> bool:
        """Return whether the run whose stages this one takes over has ended, if there is one.

        A run that outlives a comparison that was killed is given the time to save and end.
        """
        may_still_save = time.monotonic() - started_at < ORPHAN_GRACE_SECONDS
        if may_still_save and is_held_here(job.folder / LOCK_FILE):
            return False
        return shared_runs.get(job.folder) not in not_ended

    def start_job(job: TrainingJob) -> None:
        start_times[job] = time.monotonic()
        shared = _prepare_run(grid, rows.get(job.folder), shared_stages)
        copied = f"{shared}; " if shared else ""
        does = "is probed" if RunFolder(job.folder).is_finished else "trains"
        print(f"{titles[job]}: {copied}{does}, log in {job.log_file}", flush=True)

    def finish_job(job: TrainingJob, exit_code: int) -> None:
        """Note the time or the failure of a run that has ended, and print it."""
        durations.append(time.monotonic() - start_times[job])
        not_ended.remove(job.folder)
        if exit_code or not RunFolder(job.folder).is_finished:
            failed[job.folder] = job.last_log_line if exit_code else NO_RESULTS
            print_status(f"{titles[job]}: failed: {failed[job.folder]}")
            return
        left = mean(durations) * (len(todo) - len(durations)) / slot_count
        print(
            f"{titles[job]}: {_describe_result(job.folder)}; about {format_duration(left)} left",
            flush=True,
        )

    train_jobs(todo, slot_count, is_ready, start_job, finish_job, run_gpus)
    return failed


def _prepare_run(
    grid: ComparisonGrid, run: tuple[GridRow, int] | None, shared: Mapping[str, SharedStages]
) -> str:
    """Copy the stages that a run has in common with another; return which, "" for none.

    `run` is its row and seed, None for a trial of a sweep. A UserError where the row was edited.
    """
    if run is None:
        return ""
    refuse_edited_row(grid, *run)
    return copy_shared_stages(grid, *run, shared.get(run[0].name))


def _shared_runs(grid: ComparisonGrid, shared: Mapping[str, SharedStages]) -> dict[Path, Path]:
    """Return folder of a run -> that of the run whose first stages it takes over."""
    return {
        grid.run_folder(row, seed): grid.run_folder(shared[row.name].row, seed)
        for seed in grid.seeds
        for row in grid.rows
        if row.name in shared
    }


def _prepare_slurm(grid: ComparisonGrid, tasks: Sequence[PlannedTask]) -> int:
    """Write a Slurm array script for the unfinished runs and print how to submit it.

    When they have ended, the next script asks them their tasks. Runs that have diverged are left
    out: they would diverge again, and the rest of the comparison would wait for them for ever.
    """
    trials = lr_sweep.trial_jobs(grid)
    diverged = _find_diverged(trials)
    todo = [
        job
        for job in trials
        if job.folder not in diverged and not RunFolder(job.folder).is_finished
    ]
    if not todo:
        if grid.lr_factors:
            grid = _apply_sweep(grid)
        jobs = _make_jobs(grid)
        diverged = _find_diverged(jobs)
        todo = [job for job in jobs if job.folder not in diverged and not _is_done(job)]
    todo = todo or task_jobs.make_eval_jobs(grid, tasks)
    if not todo:
        return write_reports(grid, diverged, [])
    trained = [recipes.load_recipe(list(job.overrides)) for job in todo if job.verb == "fit"]
    gpus = count_run_gpus(trained)
    command = shlex.join(["sbatch", str(write_slurm_script(todo, grid.folder, trained))])
    each = "one GPU each" if gpus == 1 else f"{gpus} GPUs each"
    print(f"{command}  # {len(todo)} runs, {each}; then repeat this command")
    return 0


def _find_diverged(jobs: Sequence[TrainingJob]) -> dict[Path, str]:
    """Return folder -> reason of jobs that have diverged; print how they are trained again."""
    diverged = {}
    for job in jobs:
        run = RunFolder(job.folder)
        if reason := run.read_divergence():
            diverged[job.folder] = reason
            print_status(
                f"{job.title}: failed: {reason}. It is left out; to train it again, delete "
                f"{run.divergence_file}"
            )
    return diverged


def _describe_result(folder: Path) -> str:
    results = read_results(folder / "results.json")
    accuracy = results.get("accuracy")
    share = "unknown" if accuracy is None else f"{accuracy:.3f}"
    return f"accuracy {share} in {format_duration(results.get('seconds') or 0)}"
