"""`python -m vlbench eval`: ask a run, a checkpoint or a release questions with known answers."""

from __future__ import annotations

import re

from vlbench.evaluate.tasks.conversations import FILE, OWN
from vlbench.evaluate.tasks.run import KEYS
from vlbench.evaluate.tasks.run import main as take_tasks
from vlbench.words import given_keys


def main(words: list[str]) -> int:
    """Evaluate `run=PATH`, or `model=PATH` (a run, a checkpoint or a released model).

    `task=` names benchmarks or files; without it `data=FILE.json` asks that file's questions, and a
    run is asked its own.
    """
    words = [re.sub("^model=", "run=", word) for word in words]
    given = given_keys("eval", words, ("run",), KEYS)
    return take_tasks({"task": FILE if "data" in given else OWN, **given})
