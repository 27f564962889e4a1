"""The options of `plan`, checked before anything slow is imported."""

from __future__ import annotations

from dataclasses import dataclass

from vlbench.command_line.arguments import PlanArguments
from vlbench.command_line.parser import split_arguments
from vlbench.config import recipe as recipes
from vlbench.config.schema import Recipe
from vlbench.errors import UserError
from vlbench.key_errors import declared_keys
from vlbench.planner.gpu_table import GpuSpec, find_gpu


@dataclass(frozen=True)
class PlanOptions:
    """What to plan: a recipe, a GPU and assumptions about the data."""

    recipe: Recipe
    gpu: GpuSpec
    mfu: float
    sample_counts: tuple[int, ...]
    """One for each stage; empty: as the data say, or Yi-VL's numbers."""
    text_tokens: tuple[float, ...]
    """Text tokens of a sample, likewise."""
    probe: bool

    @property
    def world_size(self) -> int:
        """The number of GPUs."""
        return self.recipe.trainer.world_size

    @property
    def strategy(self) -> str:
        """The recipe's strategy; `auto` is ddp."""
        chosen = self.recipe.trainer.strategy
        return "ddp" if chosen == "auto" else chosen


def parse_plan_options(words: list[str]) -> PlanOptions:
    """Return the options of a command line; a UserError for anything wrong in it."""
    arguments, recipe_words = split_arguments(PlanArguments, words, declared_keys(Recipe))
    recipe = recipes.load_recipe(recipe_words)
    if recipe.init:
        from vlbench.train.resume import load_recipe_with_init  # it imports torch

        recipe = load_recipe_with_init(recipe_words)
    gpu = find_gpu(arguments.gpu, arguments.gpus)
    if arguments.price is not None:
        gpu = gpu._replace(price_per_hour=arguments.price)
    names = list(recipe.selected_stages)
    samples = _numbers_per_stage("samples", arguments.samples, names, 1e12)
    return PlanOptions(
        recipe,
        gpu,
        arguments.mfu,
        tuple(round(count) for count in samples),
        _numbers_per_stage("text_tokens", arguments.text_tokens, names, 1e6),
        arguments.probe,
    )


def _numbers_per_stage(
    key: str, text: str | None, stage_names: list[str], upper_limit: float
) -> tuple[float, ...]:
    """Return one number for each stage, from `1e6` or `1e8,25e6,1e6`; () without a text."""
    if text is None:
        return ()
    try:
        numbers = tuple(float(part) for part in text.strip("[]").split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(1 <= number <= upper_limit for number in numbers):
        raise UserError(f"{key} is '{text}'; allowed are numbers from 1 to {upper_limit:g}")
    if len(numbers) not in (1, len(stage_names)):
        raise UserError(
            f"{key} is '{text}'; allowed is one number, or one for each of {', '.join(stage_names)}"
        )
    return numbers * (len(stage_names) if len(numbers) == 1 else 1)
