"""`python -m vlbench eval`: ask a run, a checkpoint or a release questions with known answers."""

from __future__ import annotations

from vlbench.command_line.arguments import EvalArguments
from vlbench.evaluate.tasks.conversation_tasks import FILE_TASK, OWN_TASK
from vlbench.evaluate.tasks.run_tasks import run_tasks


def run_eval(arguments: EvalArguments) -> int:
    """Evaluate a model on the tasks that are named, on a file, or on a run's own questions."""
    default_task = FILE_TASK if arguments.data else OWN_TASK
    names = (arguments.task or default_task).split(",")
    return run_tasks(list(dict.fromkeys(name for name in names if name)), arguments)
