"""`python -m vlbench.compare.experiment.probe_run WORDS`: the cost of `fit WORDS`, as JSON.

A process of its own, so that the memory of one run is not counted with another's.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence

from vlbench.config import recipe as recipes
from vlbench.errors import EnvironmentFailure, UserError
from vlbench.evaluate.batch_inference import QUESTIONS_PER_BATCH, answer_questions
from vlbench.evaluate.heldout_questions import EvalQuestion, final_questions
from vlbench.model.build_vlm import build_vlm
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.train.dry_run import measure_stages
from vlbench.train.lightning_trainer import root_device
from vlbench.train.stage_plan import plan_stage_runs
from vlbench.train.throughput import peak_memory


def run_probe(overrides: list[str]) -> int:
    """Print `seconds` and `memory` (bytes) of a run; return the exit code of a mistake in it."""
    try:
        recipe = recipes.load_recipe(overrides)
        stages = list(measure_stages(recipe, plan_stage_runs(recipe)))
        seconds = sum(one.total_steps * one.step_seconds for one in stages)
        _, questions, unseen = final_questions(recipe)
        if questions:
            vlm = build_vlm(recipe.model, list(recipe.stages.values())[-1].image_size)
            vlm.to(root_device(recipe.trainer))
            asked_count = 3 * len(questions) + len(unseen)  # as they are, blank, and exchanged
            seconds += asked_count * seconds_per_question(vlm, questions[:QUESTIONS_PER_BATCH])
        print(json.dumps({"seconds": seconds, "memory": peak_memory()}))
    except (UserError, EnvironmentFailure) as error:
        print(f"vlbench: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


def seconds_per_question(vlm: LoadedVLM, questions: Sequence[EvalQuestion]) -> float:
    """Return how long a question of a batch takes."""
    began = time.monotonic()
    answer_questions(vlm, questions, "")
    return (time.monotonic() - began) / len(questions)


if __name__ == "__main__":
    sys.exit(run_probe(sys.argv[1:]))
