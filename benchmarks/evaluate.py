"""Evaluation in batches against one question at a time, in one run; the answers must be the same.

    python benchmarks/evaluate.py

Asks the miniature the first held-out questions of the rendered world, greedy, in float32.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from result_table import write_section

from vlbench.__main__ import main as vlbench
from vlbench.command_line.arguments import EvalArguments
from vlbench.evaluate.batch_inference import answer_remaining
from vlbench.evaluate.tasks.conversation_tasks import ConversationTask
from vlbench.load_model import load_model
from vlbench.model.loaded_vlm import LoadedVLM

QUESTIONS, ROUNDS, BATCH = 256, 3, 32
UNTRAINED = [f"stages.{name}.steps=0" for name in ("align_224", "align_448", "chat")]


def time_answers(
    vlm: LoadedVLM, task: ConversationTask, out: Path, batch: int
) -> tuple[float, list[str]]:
    """Ask all questions, `batch` at once; return how long that took, and the answers."""
    asked, _ = task.select_questions(vlm)
    limits = task.generation_limits(vlm, asked)
    began = time.perf_counter()
    lines = answer_remaining(vlm, asked, limits, task.count_correct, batch, out)
    return time.perf_counter() - began, [line["response"] for line in lines]


def main() -> None:
    """Print the table."""
    times: dict[int, list[float]] = {BATCH: [], 1: []}
    answers: dict[int, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = [f"log.questions={QUESTIONS // 2}", "log.examples=0", "log.tensorboard=false"]
        words.append(f"run={run}")  # new images and unseen pairs are QUESTIONS together
        if vlbench(["fit", "recipe=yivl_llava", *UNTRAINED, *words]):
            sys.exit("the run failed")
        vlm = load_model(run)
        task = ConversationTask("own", EvalArguments(model=str(run)))
        for number in range(ROUNDS):
            for batch in times:
                out = Path(folder) / f"{batch}-{number}.jsonl"
                taken, answers[batch] = time_answers(vlm, task, out, batch)
                times[batch].append(taken)
    many, one = (statistics.median(times[batch]) for batch in (BATCH, 1))
    same = sum(a == b for a, b in zip(answers[BATCH], answers[1], strict=True))
    assert len(answers[1]) == QUESTIONS
    write_section(
        "Evaluation",
        [
            f"| {QUESTIONS} questions | seconds, median of {ROUNDS} |",
            "|---|---:|",
            f"| batches of {BATCH} | {many:.1f} |",
            f"| one at a time | {one:.1f} |",
            "",
            f"{one / many:.1f} x as fast; {same} of {QUESTIONS} answers are the same.",
        ],
    )


if __name__ == "__main__":
    main()
