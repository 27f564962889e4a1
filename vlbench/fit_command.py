"""The verb `fit`: train the stages of a recipe, evaluate the model, and show the results."""

from __future__ import annotations

import contextlib

from vlbench.config.schema import Recipe
from vlbench.distributed import collectives
from vlbench.distributed.launcher import final_exit_code, silent_exit_code
from vlbench.distributed.process_group import join_process_group
from vlbench.errors import UserError
from vlbench.evaluate.run_results import write_information, write_results
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.process_settings import preserve_process_settings
from vlbench.strict_values import yaml_text
from vlbench.train import run_report
from vlbench.train.callbacks import GracefulStop
from vlbench.train.compile_choice import choose_compile
from vlbench.train.dry_run import dry_run_stages
from vlbench.train.fit import RunTraining, check_and_open_run
from vlbench.train.lightning_trainer import quiet_lightning
from vlbench.train.run_data import sync_stage_steps
from vlbench.train.run_folder import RunFolder
from vlbench.train.stage_plan import StageRun, plan_stage_runs
from vlbench.train.stage_runner import StageRunner
from vlbench.train.user_callbacks import build_user_callbacks
from vlbench.train.wandb_logging import check_wandb


def train_and_evaluate(recipe: Recipe) -> tuple[int, RunFolder | None]:
    """Train a recipe, evaluate, and say what to try next; return the exit code and the run.

    The run is None after a dry run, and in all processes but the first.
    A run that is finished shows its results; where `log.information_probes` asks for probes that it
    does not have, they are made first. One that was stopped goes on, and a stopped one is not
    evaluated.
    """
    with (
        preserve_process_settings(),
        quiet_lightning(),
        join_process_group(recipe.trainer),
        contextlib.ExitStack() as held_locks,
    ):
        exit_code, run = _fit_recipe(recipe, held_locks)
        if not collectives.is_rank_zero():
            return silent_exit_code(exit_code), None
        has_other_ranks = collectives.is_distributed()
    return (final_exit_code(exit_code) if has_other_ranks else exit_code), run


def _fit_recipe(recipe: Recipe, held_locks: contextlib.ExitStack) -> tuple[int, RunFolder | None]:
    collectives.call_on_rank_zero(lambda: check_wandb(recipe.log.wandb))
    stage_runs = collectives.call_on_rank_zero_first(
        lambda: plan_stage_runs(recipe.selected_data, recipe.last_stage_data)
    )
    if recipe.dry_run:
        return dry_run_stages(StageRunner.from_recipe(recipe), recipe.model, stage_runs), None
    user_callbacks = collectives.call_on_all_ranks(
        lambda: build_user_callbacks(recipe.trainer.callbacks)
    )
    choice = collectives.call_on_rank_zero(
        lambda: choose_compile(recipe.trainer, recipe.run, recipe.model, stage_runs)
    )
    trainer = recipe.trainer.model_copy(update={"compile": choice.compiles})
    recipe = recipe.model_copy(update={"trainer": trainer})
    run = collectives.call_on_rank_zero(lambda: check_and_open_run(recipe, stage_runs, held_locks))
    sync_stage_steps(run, stage_runs)
    # as the first process sees the folder: others may see it as it was
    is_finished, is_complete = collectives.call_on_rank_zero(
        lambda: (run.is_finished, run.is_complete(recipe.log.information_probes))
    )
    if is_complete:
        print(f"{run.folder} is finished; these are its results.")
        return collectives.call_on_rank_zero(lambda: run_report.show_results(run)), run
    if is_finished:
        collectives.call_on_rank_zero(lambda: _require_last_checkpoint(run, stage_runs[-1]))
        print(f"{run.folder} is finished; its information probes are made now.")
    run_report.show_run_start(
        f"recipe {recipe.recipe}, size {recipe.size}, seed {recipe.seed}, run {run.folder}",
        recipe.trainer,
        recipe.model,
        recipe.selected_data,
        {each.name: each.total_steps for each in stage_runs},
    )
    if choice.reason:
        print(f"trainer.compile=auto: {yaml_text(choice.compiles)} ({choice.reason})")
    with GracefulStop() as graceful_stop:
        training = RunTraining(
            StageRunner.from_recipe(recipe, run.folder),
            recipe.model,
            recipe.log,
            run,
            stage_runs,
            graceful_stop,
            user_callbacks,
        )
        vlm = training.train_stages()
        if vlm is None:
            return run_report.show_interrupted(run, graceful_stop.stop_reason), run
        if not collectives.is_rank_zero():
            return 0, run
        training.finish_training(vlm)
        is_complete = _write_end(recipe, run, vlm, training)
        if not is_complete:
            return run_report.show_interrupted(run, graceful_stop.stop_reason), run
    return run_report.show_results(run), run


def _write_end(recipe: Recipe, run: RunFolder, vlm: LoadedVLM, training: RunTraining) -> bool:
    """Write the results, or what a finished run lacks; False if that was stopped."""
    should_stop = training.graceful_stop.is_stop_requested
    if run.is_finished:
        return write_information(recipe, run, vlm, should_stop)
    spent = training.spent_by_stage()
    return write_results(recipe, run, vlm, should_stop, training.elapsed_seconds, spent)


def _require_last_checkpoint(run: RunFolder, last: StageRun) -> None:
    """Refuse to probe a finished run whose last checkpoint is gone: it would be trained again."""
    position = run.latest_position
    if position is None or (position.stage, position.step) != (last.stage_index, last.total_steps):
        raise UserError(
            f"run={run.folder} is finished, and its last checkpoint is gone: "
            "log.information_probes=true needs it. Name a new run, or leave the probes out"
        )
