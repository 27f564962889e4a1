"""What a plan is asked for: the words of `plan`, checked before anything slow is imported."""

from __future__ import annotations

from dataclasses import dataclass

from vlbench import recipe as recipes
from vlbench.mistakes import Mistake, nearest
from vlbench.plan.gpus import Gpu, gpu_of
from vlbench.schema import Recipe, keys
from vlbench.words import number, truth

OWN = ("gpu", "gpus", "mfu", "price", "samples", "text_tokens", "probe")
"""Keys of `plan` itself; all others are the recipe's."""
GPU = "A800"  # Yi-VL's
MFU = 0.4
"""Share of a GPU's products that training reaches: Llama 3 had 0.38 to 0.43 on 8,192 to 16,384
H100 (arXiv:2407.21783, table 4). What is recomputed is done on top of it."""


@dataclass(frozen=True)
class Asked:
    """What a plan is for."""

    recipe: Recipe
    gpu: Gpu
    mfu: float
    samples: tuple[int, ...]
    """Per stage, one for all, or none: what data say, or Yi-VL's."""
    text_tokens: tuple[float, ...]
    """Likewise, beside the pictures."""
    probe: bool

    @property
    def world(self) -> int:
        """GPUs in all."""
        return self.recipe.trainer.processes

    @property
    def strategy(self) -> str:
        """That of the recipe."""
        chosen = self.recipe.trainer.strategy
        return "ddp" if chosen == "auto" else chosen


def parse(words: list[str]) -> Asked:
    """Return what words ask for; a Mistake for anything wrong in them."""
    own: dict[str, str] = {}
    others: list[str] = []
    for word in words:
        key, equals, value = word.partition("=")
        if not (equals and key in OWN):
            if key.partition(".")[0] not in keys(Recipe) and (close := nearest(key, OWN)):
                raise Mistake(f"'{word}' is no key of plan or of a recipe.{close}")
            others.append(word)
        elif key in own:
            raise Mistake(f"{key} is given twice, as '{own[key]}' and '{value}'")
        else:
            own[key] = value
    recipe = recipes.load(others)
    gpu = gpu_of(own.get("gpu", GPU), own.get("gpus"))
    if "price" in own:
        gpu = gpu._replace(price=number(own, "price", 0, 0, 1e6))
    names = list(chosen(recipe))
    return Asked(
        recipe,
        gpu,
        number(own, "mfu", MFU, 0.001, 1),
        tuple(round(one) for one in _numbers(own, "samples", names, 1e12)),
        _numbers(own, "text_tokens", names, 1e6),
        truth(own, "probe"),
    )


def _numbers(own: dict[str, str], key: str, names: list[str], high: float) -> tuple[float, ...]:
    """Return one number for each stage, from `1e6` or `1e8,25e6,1e6`; none if nothing is given."""
    if key not in own:
        return ()
    parts = own[key].strip("[]").split(",")
    found = tuple(number({key: part.strip()}, key, 0, 1, high) for part in parts)
    if len(found) not in (1, len(names)):
        raise Mistake(
            f"{key} is '{own[key]}'; allowed is one number, or one for each of {', '.join(names)}"
        )
    return found * (len(names) if len(found) == 1 else 1)


def chosen(recipe: Recipe) -> dict[str, int]:
    """Return the stages that run, with their numbers among these."""
    return {name: number for number, name in enumerate(recipes.stages_to_run(recipe))}
