"""`python -m vlbench plan recipe=... gpu=...`: memory, time and money of a training, on shapes."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from vlbench import recipe as recipes
from vlbench.mistakes import Mistake
from vlbench.plan import show
from vlbench.plan.arrange import STRATEGIES, Arrangement, arrangements, cheapest
from vlbench.plan.asked import Asked, chosen
from vlbench.plan.depth import Rehearsals
from vlbench.plan.gpus import Gpu
from vlbench.plan.memory import StageMemory
from vlbench.plan.outline import outlined
from vlbench.plan.work import Work, work_of
from vlbench.train import legs
from vlbench.train.checkpointing import SPARE


@dataclass(frozen=True)
class Plan:
    """What was found."""

    asked: Asked
    stages: dict[str, StageMemory]
    works: dict[str, Work]
    assumed: bool
    """Whether lengths are assumed."""
    left_out: list[str]
    """Stages with objectives of a connector's own, whose operations nobody counts."""
    arrangements: list[Arrangement]
    best: tuple[Arrangement, dict[str, int]] | None

    @property
    def room(self) -> float:
        """Bytes that a rank may take."""
        return room_of(self.asked.gpu)

    @property
    def rows(self) -> dict[str, int]:
        """The row_tokens of the stages."""
        return {name: self.asked.recipe.stages[name].row_tokens for name in self.stages}


def room_of(gpu: Gpu) -> float:
    """Return the bytes that training may take, as `checkpointing=auto` sees it."""
    return gpu.memory * (1 - SPARE)


def plan(asked: Asked) -> Plan:
    """Count everything; nothing is trained, and no weight takes memory."""
    recipe = asked.recipe
    legs.check_data(recipe, legs.plan(recipe, without_data=True))
    stages: dict[str, StageMemory] = {}
    works: dict[str, Work] = {}
    left_out, assumed = [], False
    for name, place in chosen(recipe).items():
        stage = recipe.stages[name]
        if stage.objective != "language":
            left_out.append(name)
            continue
        vlm = outlined(recipe, name)
        pairs = asked.samples[place] if asked.samples else None
        text = asked.text_tokens[place] if asked.text_tokens else None
        works[name], guessed = work_of(recipe, name, vlm, pairs, text)
        assumed |= guessed
        make = functools.partial(outlined, recipe, name)
        rehearsals = Rehearsals(vlm, make, recipe.precision)
        width = 2 if recipe.precision == "bf16" else 4
        stages[name] = StageMemory(vlm, rehearsals, works[name].sample, width, asked.world)
    if not stages:
        raise Mistake("there is no stage to plan: plan counts stages that learn language")
    rows = {name: recipe.stages[name].row_tokens for name in stages}
    strategies = STRATEGIES if asked.world > 1 else STRATEGIES[:1]
    found = arrangements(stages, works, rows, room_of(asked.gpu), strategies)
    best = cheapest(found, stages, rows, room_of(asked.gpu))
    return Plan(asked, stages, works, assumed, left_out, found, best)


def main(asked: Asked) -> int:
    """Print the plan of a training; with `probe=true` try it here. Return the exit code."""
    if asked.probe:
        recipes.require_data(asked.recipe)
    print("\n".join(show.lines(plan(asked))), flush=True)
    if not asked.probe:
        return 0
    from vlbench.train.stages import fit

    print("\nprobe: one step of every stage, longest batch first", flush=True)
    return fit(dataclasses.replace(asked.recipe, dry_run=True))
