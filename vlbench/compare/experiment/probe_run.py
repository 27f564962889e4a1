"""`python -m vlbench.compare.experiment.probe_run WORDS`: what `fit WORDS` costs, as JSON.

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
from vlbench.evaluate.budget_card import unused_objectives
from vlbench.evaluate.heldout_questions import final_questions
from vlbench.model.build_vlm import build_vlm
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.train.dry_run import measure_stages
from vlbench.train.lightning_trainer import root_device
from vlbench.train.stage_plan import plan_stage_runs
from vlbench.train.throughput import peak_memory


def run_probe(overrides: list[str]) -> int:
    """Print the cost of a run; return the exit code of a mistake in it.

    It is `seconds`, `memory` (bytes), and `question_seconds`, those of one question at its end.
    Also `cut`: by stage the samples of its first steps, how many are cut at `language.max_length`,
    and `unused_objectives` of its connector, [] where it begins with given weights.
    """
    try:
        recipe = recipes.load_recipe(overrides)
        stages = list(measure_stages(recipe, plan_stage_runs(recipe)))
        vlm = build_vlm(recipe.model, list(recipe.stages.values())[-1].image_size)
        each, count = time_questions(recipe, vlm)
        seconds = sum(one.total_steps * one.step_seconds for one in stages) + each * count
        ran = list(recipe.selected_stages.values())
        found = {
            "seconds": seconds,
            "memory": peak_memory(),
            "question_seconds": each,
            "cut": {one.stage_name: one.planned for one in stages},
            "unused_objectives": [] if recipe.init else unused_objectives(vlm.connector, ran),
        }
        print(json.dumps(found))
    except (UserError, EnvironmentFailure) as error:
        print(f"vlbench: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


def time_questions(recipe: Recipe, vlm: LoadedVLM) -> tuple[float, int]:
    """Return about how long a question at the end takes, by one batch, and how many are asked."""
    _, questions, unseen = final_questions(recipe)
    if not questions:
        return 0.0, 0
    vlm.to(root_device(recipe.trainer))
    began = time.monotonic()
    answer_questions(vlm, questions[:QUESTIONS_PER_BATCH], "")
    each = (time.monotonic() - began) / len(questions[:QUESTIONS_PER_BATCH])
    return each, 3 * len(questions) + len(unseen)  # asked as they are, blank, and exchanged


if __name__ == "__main__":
    sys.exit(run_probe(sys.argv[1:]))
