"""The options of `plan`, checked before anything slow is imported."""

from __future__ import annotations

from dataclasses import dataclass

from vlbench.config import recipe as recipes
from vlbench.config.overrides import read_boolean, read_number
from vlbench.config.schema import Recipe, declared_keys
from vlbench.errors import UserError, suggest_name
from vlbench.planner.gpu_table import GpuSpec, find_gpu

PLAN_KEYS = ("gpu", "gpus", "mfu", "price", "samples", "text_tokens", "probe")
"""Keys of `plan` itself; all others are the recipe's."""
DEFAULT_GPU = "A800"  # Yi-VL was trained on it
DEFAULT_MFU = 0.4
"""Model FLOPs utilisation, without recomputed FLOPs: Llama 3 reached 0.38 to 0.43 on 8,192 to
16,384 H100 (arXiv:2407.21783, table 4)."""


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


def parse_plan_options(overrides: list[str]) -> PlanOptions:
    """Return the options of a command line; a UserError for anything wrong in it."""
    own: dict[str, str] = {}
    others: list[str] = []
    for word in overrides:
        key, equals, value = word.partition("=")
        if not (equals and key in PLAN_KEYS):
            if key.partition(".")[0] not in declared_keys(Recipe) and (
                close := suggest_name(key, PLAN_KEYS)
            ):
                raise UserError(f"'{word}' is no key of plan or of a recipe.{close}")
            others.append(word)
        elif key in own:
            raise UserError(f"{key} is given twice, as '{own[key]}' and '{value}'")
        else:
            own[key] = value
    recipe = recipes.load_recipe(others)
    gpu = find_gpu(own.get("gpu", DEFAULT_GPU), own.get("gpus"))
    if "price" in own:
        gpu = gpu._replace(price_per_hour=read_number(own, "price", 0, 0, 1e6))
    names = list(stage_indices(recipe))
    return PlanOptions(
        recipe,
        gpu,
        read_number(own, "mfu", DEFAULT_MFU, 0.001, 1),
        tuple(round(count) for count in _numbers_per_stage(own, "samples", names, 1e12)),
        _numbers_per_stage(own, "text_tokens", names, 1e6),
        read_boolean(own, "probe"),
    )


def _numbers_per_stage(
    plan_values: dict[str, str], key: str, stage_names: list[str], upper_limit: float
) -> tuple[float, ...]:
    """Return one number for each stage, from `1e6` or `1e8,25e6,1e6`; () without the key."""
    if key not in plan_values:
        return ()
    parts = plan_values[key].strip("[]").split(",")
    numbers = tuple(read_number({key: part.strip()}, key, 0, 1, upper_limit) for part in parts)
    if len(numbers) not in (1, len(stage_names)):
        raise UserError(
            f"{key} is '{plan_values[key]}'; allowed is one number, or one for each of "
            f"{', '.join(stage_names)}"
        )
    return numbers * (len(stage_names) if len(numbers) == 1 else 1)


def stage_indices(recipe: Recipe) -> dict[str, int]:
    """Return the names of the stages that run, with their index among these."""
    return {name: number for number, name in enumerate(recipes.stages_to_run(recipe))}
