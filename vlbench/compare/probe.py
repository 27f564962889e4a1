"""`python -m vlbench.compare.probe WORDS`: what a run of `fit WORDS` will take, as JSON.

A process of its own, so that the memory of one run is not counted with another's.
"""

from __future__ import annotations

import json
import sys
import time

from vlbench import recipe as recipes
from vlbench.evaluate.ask import ROWS, ask
from vlbench.evaluate.results import questions_of
from vlbench.mistakes import Mistake, Trouble
from vlbench.model.compose import compose
from vlbench.schema import Recipe
from vlbench.train.dry import measure
from vlbench.train.legs import plan
from vlbench.train.speed import peak_memory
from vlbench.train.trainer import trainer_of


def main(words: list[str]) -> int:
    """Print `seconds` and `memory` (bytes) of a run; return the exit code of a mistake in it."""
    try:
        recipe = recipes.load(words)
        stages = list(measure(recipe, plan(recipe)))
        seconds = sum(one.steps * one.step_seconds for one in stages) + asking_seconds(recipe)
        print(json.dumps({"seconds": seconds, "memory": peak_memory()}))
    except (Mistake, Trouble) as error:
        print(f"vlbench: {error}", file=sys.stderr)
        return 2 if isinstance(error, Mistake) else 1
    return 0


def asking_seconds(recipe: Recipe) -> float:
    """Return about how long the questions at the end take, by one batch of them."""
    _, questions, unseen = questions_of(recipe)
    if not questions:
        return 0.0
    vlm = compose(recipe, list(recipe.stages.values())[-1].image_size)
    vlm.to(trainer_of(recipe, [], None).strategy.root_device)
    began = time.monotonic()
    ask(vlm, questions[:ROWS], "")
    each = (time.monotonic() - began) / len(questions[:ROWS])
    return each * (3 * len(questions) + len(unseen))  # asked as they are, blank, and exchanged


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
