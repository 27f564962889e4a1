"""`python -m vlbench.compare.experiment.probe_run WORDS`: what `fit WORDS` costs, as JSON.

Processes of its own, as many as the run has devices, so that the memory of one run is not counted
with another's, and a model that is sharded over several is tried as it will be trained.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence

from vlbench.config import recipe as recipes
from vlbench.distributed import collectives
from vlbench.distributed.launcher import end_with_launcher, is_launched, launch_processes
from vlbench.distributed.process_group import join_process_group
from vlbench.errors import EnvironmentFailure, UserError
from vlbench.evaluate.askable_questions import split_askable
from vlbench.evaluate.batch_inference import QUESTIONS_PER_BATCH, answer_questions
from vlbench.evaluate.budget_card import unused_objectives
from vlbench.evaluate.heldout_questions import EvalQuestion, final_questions
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.system_errors import explain_system_error
from vlbench.train.dry_run import measure_stages
from vlbench.train.fit import build_or_resume_model
from vlbench.train.resume import load_recipe_with_init
from vlbench.train.stage_plan import plan_stage_runs
from vlbench.train.stage_runner import StageRunner
from vlbench.train.throughput import peak_memory


def launch_probe(overrides: list[str]) -> int:
    """Run the probe in a process for each device of the run; return the exit code."""
    if not is_launched():
        try:
            trainer = recipes.load_recipe(overrides).trainer
        except UserError as error:
            print(f"vlbench: {error}", file=sys.stderr)
            return 2
        if trainer.world_size > 1:
            return launch_processes(overrides, trainer, "vlbench.compare.experiment.probe_run")
    end_with_launcher()
    return run_probe(overrides)


def run_probe(overrides: list[str]) -> int:
    """Print the cost of a run; return the exit code of a mistake in it.

    It is `seconds`, `memory` (bytes), and `question_seconds`, those of one question at its end; 0
    where the model may not fit on one device, as it is sharded.
    Also `cut`: by stage the samples of its first steps, how many are cut at `language.max_length`,
    and `unused_objectives` of its connector, [] where it begins with given weights.
    """
    try:
        recipe = load_recipe_with_init(overrides)
        runner = StageRunner.from_recipe(recipe)
        with join_process_group(recipe.trainer):
            stage_runs = collectives.call_on_rank_zero_first(
                lambda: plan_stage_runs(recipe.selected_data, recipe.last_stage_data)
            )
            stages = list(measure_stages(runner, recipe.model, stage_runs))
            is_first = collectives.is_rank_zero()
        if not is_first:  # one process asks the questions at the end of a run
            return 0
        vlm, _ = build_or_resume_model(recipe.model, stage_runs, is_sharded=False)
        vlm.set_image_size(recipe.last_stage_data.stage.image_size)
        _, *wanted = final_questions(recipe.last_stage_data, recipe.log.questions)
        questions, unseen = (split_askable(vlm.processor, some)[0] for some in wanted)
        each = 0.0 if runner.is_sharded else time_question(vlm.to(runner.device), questions)
        count = 3 * len(questions) + len(unseen)  # asked as they are, blank, and exchanged
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
    except Exception as error:
        is_told = isinstance(error, UserError | EnvironmentFailure)
        explained = error if is_told else explain_system_error(error)
        if explained is None:
            raise
        print(f"vlbench: {explained}", file=sys.stderr)
        return 2 if isinstance(explained, UserError) else 1
    return 0


def time_question(vlm: LoadedVLM, questions: Sequence[EvalQuestion]) -> float:
    """Return about how many seconds one of the questions takes, by the first batch of them."""
    batch = questions[:QUESTIONS_PER_BATCH]
    if not batch:
        return 0.0
    began = time.monotonic()
    answer_questions(vlm, batch, "")
    return (time.monotonic() - began) / len(batch)


if __name__ == "__main__":
    sys.exit(launch_probe(sys.argv[1:]))
