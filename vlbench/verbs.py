"""The verbs of the command line: what each is for, and the one function that it calls.

Modules are imported inside of the functions: the help of the program needs none of them, and those
that import torch come after the words have been checked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, NamedTuple

from vlbench.garbage_collection import pause_garbage_collection

if TYPE_CHECKING:
    from vlbench.config.schema import Recipe


class VerbEntry(NamedTuple):
    """A verb: what it does, what runs it, and what it takes."""

    summary: str
    run_verb: Callable[[list[str]], int]
    example: str
    """Words behind the verb that make a whole command."""
    takes_recipe_keys: bool = False


def run_fit(words: list[str]) -> int:
    """Train a recipe."""
    from vlbench.config import recipe as recipes
    from vlbench.distributed.launcher import (
        end_with_launcher,
        exit_silently_on_ctrl_c,
        is_launched,
        launch_processes,
        report_error_once,
    )
    from vlbench.distributed.machine_limits import check_machine_limits

    exit_silently_on_ctrl_c()
    end_with_launcher()
    with report_error_once():
        recipe = recipes.load_recipe(words)
        recipes.require_data(recipe.size, recipe.selected_data)
        check_machine_limits(recipe.trainer, recipe.data_by_key, is_launched())
    if recipe.trainer.world_size > 1 and not is_launched():
        return launch_processes(["fit", *words], recipe.trainer)
    with pause_garbage_collection():
        from vlbench import fit_command  # after the checks, as it imports torch

    exit_code, _ = fit_command.train_and_evaluate(resolve_recipe(words))
    return exit_code


def run_eval(words: list[str]) -> int:
    """Evaluate a model."""
    from vlbench.command_line.task_words import parse_eval_words

    tasks = parse_eval_words(words)
    with pause_garbage_collection():
        from vlbench.evaluate.eval_command import run_eval as evaluate_model

    return evaluate_model(tasks)


def run_score(words: list[str]) -> int:
    """Score answers to a benchmark."""
    from vlbench.command_line.arguments import ScoreArguments
    from vlbench.command_line.parser import parse_arguments

    arguments = parse_arguments(ScoreArguments, words)
    from vlbench.evaluate.score_command import run_score as score_answers

    return score_answers(arguments)


def run_chat(words: list[str]) -> int:
    """Talk to a model."""
    from vlbench.command_line.arguments import ChatArguments
    from vlbench.command_line.parser import parse_arguments
    from vlbench.model.generation.sampling_options import TRANSFORMERS_HINTS

    arguments = parse_arguments(ChatArguments, words, hints=TRANSFORMERS_HINTS)
    from vlbench.serve.chat_command import run_chat as talk

    return talk(arguments)


def run_serve(words: list[str]) -> int:
    """Serve models over HTTP."""
    from vlbench.command_line.arguments import ServeArguments
    from vlbench.command_line.parser import parse_arguments

    arguments = parse_arguments(ServeArguments, words)
    from vlbench.serve.serve_command import run_serve as serve_models

    return serve_models(arguments)


def run_export(words: list[str]) -> int:
    """Write a model in a layout that others load."""
    from vlbench.command_line.arguments import ExportArguments
    from vlbench.command_line.parser import parse_arguments

    arguments = parse_arguments(ExportArguments, words)
    with pause_garbage_collection():
        from vlbench.serve.export_command import run_export as write_model

    return write_model(arguments)


def run_check(words: list[str]) -> int:
    """Check the data of a recipe."""
    from pathlib import Path

    from vlbench.command_line.arguments import CheckArguments
    from vlbench.command_line.parser import split_arguments
    from vlbench.config import recipe as recipes

    arguments, recipe_words = split_arguments(CheckArguments, words, recipe_key_names())
    recipe = recipes.load_recipe(recipe_words)
    recipes.require_data(recipe.size, recipe.selected_data)
    with pause_garbage_collection():
        from vlbench.check.check_command import run_check as check_data  # after the checks

    recipe = resolve_recipe(recipe_words)
    return check_data(recipe, Path(arguments.out or f"checks/{recipe.recipe}-{recipe.size}"))


def run_pack(words: list[str]) -> int:
    """Pack a data set into shards."""
    from vlbench.command_line.arguments import PackArguments
    from vlbench.command_line.parser import parse_arguments

    arguments = parse_arguments(PackArguments, words)
    with pause_garbage_collection():
        from vlbench.data.write_shards import run_pack as pack_data

    return pack_data(arguments)


def run_compare(words: list[str]) -> int:
    """Train a grid of runs and report."""
    from vlbench.compare.experiment.grid import parse_grid

    grid = parse_grid(words)
    with pause_garbage_collection():
        from vlbench.compare.experiment.compare_command import run_compare as compare_recipes

    return compare_recipes(grid)


def run_plan(words: list[str]) -> int:
    """Say what a training needs."""
    from vlbench.planner.options import parse_plan_options

    options = parse_plan_options(words)
    with pause_garbage_collection():
        from vlbench.planner.plan_command import run_plan as plan_training

    return plan_training(options)


def run_graft(words: list[str]) -> int:
    """Say whether three parts fit, and write the recipe that trains them."""
    from vlbench.graft.graft_options import parse_graft_options

    options = parse_graft_options(words)
    with pause_garbage_collection():
        from vlbench.graft.graft_command import run_graft as graft_parts

    return graft_parts(options)


def run_report(words: list[str]) -> int:
    """Compare finished runs."""
    from vlbench.command_line.compare_arguments import ReportArguments
    from vlbench.command_line.parser import parse_arguments

    arguments = parse_arguments(ReportArguments, words)
    from vlbench.compare.report.report_command import run_report as report_runs

    return report_runs(arguments)


def run_show(words: list[str]) -> int:
    """Print a resolved recipe."""
    from vlbench.config import recipe as recipes

    print(recipes.recipe_to_yaml(resolve_recipe(words)), end="")
    return 0


def run_test_connector(words: list[str]) -> int:
    """Check a connector."""
    from vlbench.command_line.arguments import ConnectorTestArguments
    from vlbench.command_line.parser import parse_arguments

    arguments = parse_arguments(ConnectorTestArguments, words)
    with pause_garbage_collection():
        from vlbench.contract_checks.contract_command import run_contract_command

    return run_contract_command(arguments)


def run_list(words: list[str]) -> int:
    """Print what recipes can name."""
    from vlbench.command_line.arguments import ListArguments
    from vlbench.command_line.parser import parse_arguments

    arguments = parse_arguments(ListArguments, words)
    from vlbench import listing

    print("\n".join(listing.listing_lines(arguments)))
    return 0


def resolve_recipe(words: list[str]) -> Recipe:
    """Return the recipe that `words` describe; what it leaves open is as in its `init`."""
    from vlbench.config import recipe as recipes

    recipe = recipes.load_recipe(words)
    if not recipe.init:
        return recipe
    with pause_garbage_collection():
        from vlbench.train.resume import load_recipe_with_init  # it imports torch

    return load_recipe_with_init(words)


def recipe_key_names() -> Collection[str]:
    """Return the top-level keys of recipes."""
    from vlbench.config.schema import Recipe
    from vlbench.key_errors import declared_keys

    return declared_keys(Recipe)


VERBS = {
    "fit": VerbEntry(
        "train a recipe and evaluate it",
        run_fit,
        "recipe=yivl_llava seed=1",
        takes_recipe_keys=True,
    ),
    "eval": VerbEntry(
        "evaluate a model on its own questions, a file, or a benchmark",
        run_eval,
        "model=RUN task=mmmu,cmmmu limit=100 blank=true",
    ),
    "score": VerbEntry(
        "score answers to MMMU or CMMMU as the benchmarks' own code does",
        run_score,
        "task=mmmu answers=FILE protocol=official",
    ),
    "chat": VerbEntry(
        "talk to a run, a checkpoint or a released model",
        run_chat,
        "model=RUN image=FILE question='What is it?'",
    ),
    "serve": VerbEntry(
        "answer over HTTP as OpenAI's API does, with one model or several",
        run_serve,
        "model=RUN port=8000",
    ),
    "export": VerbEntry(
        "write a run, a checkpoint or a released model in a layout that others load",
        run_export,
        "model=RUN out=DIR format=hf_llava dtype=bf16",
    ),
    "check": VerbEntry(
        "check all data of a recipe before training: faults, lengths, supervised tokens",
        run_check,
        "recipe=yivl_llava data.train=FILE.json data.images=FOLDER out=DIR",
        takes_recipe_keys=True,
    ),
    "plan": VerbEntry(
        "say what a training needs before it is paid for: memory, time, what fits",
        run_plan,
        "recipe=yivl_llava size=34b trainer.devices=8 trainer.num_nodes=16 price=2",
        takes_recipe_keys=True,
    ),
    "graft": VerbEntry(
        "say whether a vision encoder, a connector and a language model fit; write their recipe",
        run_graft,
        "vision=ViT-L-14-quickgelu language=yi-6b connector=qformer gpu=H200 out=recipes/mine.yaml",
        takes_recipe_keys=True,
    ),
    "pack": VerbEntry(
        "pack a data set into shards (tar files) that stream from disk",
        run_pack,
        "data=FILE.json images=FOLDER out=DIR",
    ),
    "compare": VerbEntry(
        "train every recipe with every seed, and report the differences",
        run_compare,
        "recipe=yivl_llava,yivl_qformer seeds=3 match=params",
        takes_recipe_keys=True,
    ),
    "report": VerbEntry(
        "compare finished runs: intervals, differences, costs; count votes",
        run_report,
        "RUN RUN out=FILE.html",
    ),
    "show": VerbEntry(
        "print a resolved recipe",
        run_show,
        "recipe=yivl_llava size=34b",
        takes_recipe_keys=True,
    ),
    "list": VerbEntry(
        "print recipes, sizes, connectors, vision encoders and layouts of data",
        run_list,
        "connectors size=6b",
    ),
    "test-connector": VerbEntry(
        "check that a connector keeps the contract, on a small random model",
        run_test_connector,
        "connectors/mine.py connector.heads=2",
    ),
}
