"""`python -m vlbench.compare.experiment.probe_run WORDS`: the cost of `fit WORDS`, as JSON.

A process of its own, so that the memory of one run is not counted with another's.
"""

from __future__ import annotations

import json
import sys
import time

from vlbench.config import recipe as recipes
from vlbench.config.schema import Recipe
from vlbench.errors import EnvironmentFailure, UserError
from vlbench.evaluate.batch_inference import QUESTIONS_PER_BATCH, answer_questions
from vlbench.evaluate.heldout_questions import final_questions
from vlbench.model.build_vlm import build_vlm
from vlbench.train.dry_run import measure_stages
from vlbench.train.lightning_trainer import root_device
from vlbench.train.stage_plan import plan_stage_runs
from vlbench.train.throughput import peak_memory


def run_probe(overrides: list[str]) -> int:
    """Print the cost of a run; return the exit code of a mistake in it.

    It is `seconds`, `memory` (bytes), and `question_seconds`, those of one question at its end.
    """
    try:
        recipe = recipes.load_recipe(overrides)
        stages = list(measure_stages(recipe, plan_stage_runs(recipe)))
        each, count = time_questions(recipe)
        seconds = sum(one.total_steps * one.step_seconds for one in stages) + each * count
        cost = {"seconds": seconds, "memory": peak_memory(), "question_seconds": each}
        print(json.dumps(cost))
    except (UserError, EnvironmentFailure) as error:
        print(f"vlbench: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


def time_questions(recipe: Recipe) -> tuple[float, int]:
    """Return about how long a question at the end takes, by one batch, and how many are asked."""
    _, questions, unseen = final_questions(recipe)
    if not questions:
        return 0.0, 0
    vlm = build_vlm(recipe.model, list(recipe.stages.values())[-1].image_size)
    vlm.to(root_device(recipe.trainer))
    began = time.monotonic()
    answer_questions(vlm, questions[:QUESTIONS_PER_BATCH], "")
    each = (time.monotonic() - began) / len(questions[:QUESTIONS_PER_BATCH])
    return each, 3 * len(questions) + len(unseen)  # asked as they are, blank, and exchanged


if __name__ == "__main__":
    sys.exit(run_probe(sys.argv[1:]))
