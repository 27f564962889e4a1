"""`python -m vlbench eval`: ask a run, a checkpoint or a release questions with known answers."""

from __future__ import annotations

import re

from vlbench.config.overrides import parse_key_values
from vlbench.evaluate.tasks.conversation_tasks import FILE_TASK, OWN_TASK
from vlbench.evaluate.tasks.run_tasks import EVAL_OPTIONS, run_tasks


def run_eval(overrides: list[str]) -> int:
    """Evaluate `run=PATH`, or `model=PATH` (a run, a checkpoint or a released model).

    `task=` names benchmarks or files; without it `data=FILE.json` asks that file's questions, and a
    run is asked its own.
    """
    overrides = [re.sub("^model=", "run=", word) for word in overrides]
    given = parse_key_values("eval", overrides, ("run",), EVAL_OPTIONS)
    return run_tasks({"task": FILE_TASK if "data" in given else OWN_TASK, **given})
