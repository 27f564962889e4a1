"""A model takes a task: asked batch by batch, answers kept as they come.

A folder of an exam holds

    exam.json       what is asked, how, and of which model: another exam is refused
    answers.jsonl   a line per question; `score` reads those of MMMU and CMMMU
    blank.jsonl     the same with blank pictures, on request
    skipped.jsonl   questions that are not asked, and why
    scores.json scored.jsonl report.txt, or submission.* where the answers are withheld

A batch is always the same questions, so an exam that was stopped ends as if it had not been.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from vlbench.data.image_processing import blank_image
from vlbench.data.sample import Sample
from vlbench.errors import UserError
from vlbench.evaluate.tasks.benchmark_types import GenerationLimits
from vlbench.model.generation.chat_messages import collate_prompts
from vlbench.model.generation.generate import decode_answer
from vlbench.model.vlm import VLM
from vlbench.text_files import format_json_lines, read_json, read_json_lines, write_atomically

ANSWERS_FILE, BLANK_FILE, SKIPPED_FILE, SETTINGS_FILE = (
    "answers.jsonl",
    "blank.jsonl",
    "skipped.jsonl",
    "exam.json",
)


class TaskQuestion(Protocol):
    """What `take` needs of a question."""

    @property
    def sample(self) -> Sample:
        """The conversation that ends with the question."""
        ...

    @property
    def answer_line(self) -> dict[str, Any]:
        """What stands in answers.jsonl, `id` first, but for the response."""
        ...


def answer_remaining(
    vlm: VLM,
    questions: Sequence[TaskQuestion],
    generation_limits: GenerationLimits,
    count_correct: Callable[[list[dict[str, Any]]], int | None],
    batch_size: int,
    answers_file: Path,
    use_blank_images: bool = False,
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """Ask what the file does not answer yet; answers are written to it batch by batch.

    Args:
        vlm: The model.
        questions: All questions of the task.
        generation_limits: The most new tokens, and the text at which an answer is cut.
        count_correct: Counts right answers among lines for the progress bar; None if unknown.
        batch_size: Questions answered at once.
        answers_file: File of the answers, a line each.
        use_blank_images: Ask with blank images in place of the real ones.
        compiled: Compile the decoding step.

    Returns:
        All lines of the file.
    """
    done = _keep_whole_batches(answers_file, questions, batch_size)
    correct = 0
    with (
        _report_kept_answers(answers_file, questions),
        tqdm(
            total=len(questions),
            initial=done,
            desc=answers_file.stem,
            unit="question",
            disable=None,
        ) as bar,
        answers_file.open("a", encoding="utf-8") as kept,
    ):
        for first in range(done, len(questions), batch_size):
            some = questions[first : first + batch_size]
            samples = [
                _blank_sample(vlm, one.sample) if use_blank_images else one.sample for one in some
            ]
            new = vlm.generate(
                collate_prompts(vlm, samples),
                max_new_tokens=generation_limits.max_new_tokens,
                compiled=compiled,
            )
            texts = [_cut_at_stop(decode_answer(vlm, ids), generation_limits.stop) for ids in new]
            lines = [
                {**one.answer_line, "response": text} for one, text in zip(some, texts, strict=True)
            ]
            kept.write(format_json_lines(lines))
            kept.flush()
            bar.update(len(some))
            counted = count_correct(lines)
            if counted is not None:
                correct += counted
                bar.set_postfix_str(f"{correct / (first + len(some) - done):.3f} right")
    return read_json_lines(answers_file)


@contextlib.contextmanager
def _report_kept_answers(answers_file: Path, questions: Sequence[TaskQuestion]) -> Iterator[None]:
    """Say where the answers are when somebody interrupts."""
    try:
        yield
    except KeyboardInterrupt:
        count = len(read_json_lines(answers_file))
        print(
            f"\n{count} of {len(questions)} answers are kept in {answers_file}; the same "
            "command goes on",
            file=sys.stderr,
        )
        raise


def _keep_whole_batches(
    answers_file: Path, questions: Sequence[TaskQuestion], batch_size: int
) -> int:
    """Return how many questions `file` answers in whole batches; a torn batch is cut off."""
    whole = read_json_lines(answers_file)
    done = len(whole) if len(whole) == len(questions) else len(whole) // batch_size * batch_size
    if [line.get("id") for line in whole[:done]] != [
        one.answer_line["id"] for one in questions[:done]
    ]:
        raise UserError(f"{answers_file}: holds the answers to other questions; name another out=")
    write_atomically(answers_file, format_json_lines(whole[:done]))
    return done


def _blank_sample(vlm: VLM, sample: Sample) -> Sample:
    pictures = tuple(blank_image(picture, vlm.transform.mean) for picture in sample.images)
    return replace(sample, images=pictures)


def _cut_at_stop(text: str, stop: str) -> str:
    return text.split(stop)[0].strip() if stop else text


def open_task_folder(folder: Path, task_settings: dict[str, Any]) -> None:
    """Make the folder of an exam, or go on with the same exam; a Mistake for another one."""
    file = folder / SETTINGS_FILE
    if file.is_file():
        before = read_json(file)
        differ = [
            f"{key} ({before.get(key)} before, {task_settings.get(key)} now)"
            for key in {**before, **task_settings}
            if before.get(key) != task_settings.get(key)
        ]
        if differ:
            raise UserError(f"out={folder} is another exam; it differs in {', '.join(differ)}")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(task_settings, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"out={folder} cannot be written ({error.strerror})") from error
