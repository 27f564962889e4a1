"""A model answers many questions in batches, in memory or resumably into a folder.

A folder of answers holds

    settings.json   what is asked, how, and of which model (its path and a checksum of its weights):
                    where answers are kept, other settings are refused; `batch` is that of the
                    latest call
    answers.jsonl   a line per question; `score` reads those of MMMU and CMMMU
    blank.jsonl     the same with blank images, on request
    skipped.jsonl   questions that are not asked, and why
    scores.json scored.jsonl report.txt, or submission.* where the true answers are withheld

A batch always holds the same questions, so that an interrupted evaluation ends with the answers
of an uninterrupted one. Under another `batch` they are the same but for rounding.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from vlbench.data.image_processing import blank_image
from vlbench.data.sample import Sample
from vlbench.errors import UserError
from vlbench.evaluate.heldout_questions import EvalQuestion
from vlbench.evaluate.tasks.benchmark_types import GenerationLimits
from vlbench.file_lock import hold_folder
from vlbench.model.generation.answer_text import decode_answer
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.system_errors import explain_unwritable, is_memory_error
from vlbench.text_files import (
    append_text,
    format_json,
    format_json_lines,
    read_json,
    read_json_lines,
    write_atomically,
)

# More questions in a batch gain nothing on two cores, and take memory for the KV cache.
QUESTIONS_PER_BATCH = 64
EXTRA_TOKENS = 4  # tokens beyond the longest true answer: a longer one is wrong anyway
ANSWERS_FILE, BLANK_FILE, SKIPPED_FILE = "answers.jsonl", "blank.jsonl", "skipped.jsonl"
SETTINGS_FILE, REPORT_FILE, SCORES_FILE = "settings.json", "report.txt", "scores.json"
SCORE_PATTERNS = (REPORT_FILE, SCORES_FILE, "scored.jsonl", "submission.*")
FREE_SETTINGS = ("batch",)
"""What may change beside kept answers: padding is masked, so that an answer depends on its batch by
rounding alone, and where memory ran out, a smaller batch is what lets the same folder go on."""
CHECKSUM_SETTINGS = ("weights", "pictures")
"""Not in folders of earlier versions, whose answers are taken for those of the same contents."""


def answer_batch(vlm: LoadedVLM, samples: Sequence[Sample], **generation_options: Any) -> list[str]:
    """Return the model's answer to every sample, which ends with a question, as one batch."""
    batch = vlm.processor.collate_prompts(samples).to(vlm.device)
    generated = vlm.generate(batch, **generation_options)
    return [decode_answer(vlm.processor, new_ids) for new_ids in generated]


def max_answer_tokens(vlm: LoadedVLM, true_answers: Sequence[str]) -> int:
    """Return how many tokens an answer may have: the longest true one, and EXTRA_TOKENS."""
    lengths = (len(vlm.tokenizer.encode(f" {answer}\n###")) for answer in true_answers)
    return max(lengths, default=0) + EXTRA_TOKENS


def answer_questions(
    vlm: LoadedVLM,
    questions: Sequence[EvalQuestion],
    title: str,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Return the greedy answer to every question, [] if `should_stop` became true before the end.

    Questions of similar length share a batch, half as many where memory does not suffice. A
    UserError where one cannot be encoded (`split_askable` leaves those out).
    """
    max_new_tokens = max_answer_tokens(vlm, [question.answer for question in questions])
    prompt_lengths = [len(vlm.processor.encode_prompt(question.sample)) for question in questions]
    order = sorted(range(len(questions)), key=prompt_lengths.__getitem__)
    answers = [""] * len(questions)
    start, batch_size = 0, QUESTIONS_PER_BATCH
    with tqdm(total=len(questions), desc=title, unit="question", disable=None) as bar:
        while start < len(order):
            if should_stop():
                return []
            indices = order[start : start + batch_size]
            samples = [questions[index].sample for index in indices]
            try:
                new_answers = answer_batch(vlm, samples, max_new_tokens=max_new_tokens)
            except Exception as error:
                if len(indices) == 1 or not is_memory_error(error):
                    raise
                batch_size = len(indices) // 2
                continue
            for index, answer in zip(indices, new_answers, strict=True):
                answers[index] = answer
            start += len(indices)
            bar.update(len(indices))
    return answers


class TaskQuestion(Protocol):
    """What `answer_remaining` needs of a question."""

    @property
    def sample(self) -> Sample:
        """The conversation that ends with the question."""
        ...

    @property
    def answer_line(self) -> dict[str, Any]:
        """The line of answers.jsonl, `id` first, without the response."""
        ...


def answer_remaining(
    vlm: LoadedVLM,
    questions: Sequence[TaskQuestion],
    generation_limits: GenerationLimits,
    count_correct: Callable[[list[dict[str, Any]]], int | None],
    batch_size: int,
    answers_file: Path,
    use_blank_images: bool = False,
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """Ask the questions that a file does not answer yet; each batch is written when it is done.

    Args:
        vlm: The model that answers, greedily.
        questions: All questions, those that are answered included.
        generation_limits: How long an answer may be, and where it is cut.
        count_correct: Returns how many of the lines are right, None if that is unknown; for the
            progress bar.
        batch_size: Questions per batch.
        answers_file: Where lines are appended.
        use_blank_images: Whether every image is replaced by a blank one.
        compiled: Whether the decoding step is compiled.

    Returns:
        All lines of the file.

    Raises:
        UserError: The file answers other questions.
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
        append_text(answers_file) as stream,
    ):
        for start in range(done, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            samples = [question.sample for question in batch]
            if use_blank_images:
                samples = [_blank_sample(one, vlm.processor.transform.mean) for one in samples]
            responses = answer_batch(
                vlm,
                samples,
                max_new_tokens=generation_limits.max_new_tokens,
                compiled=compiled,
            )
            lines = [
                {**question.answer_line, "response": _cut_at_stop(text, generation_limits.stop)}
                for question, text in zip(batch, responses, strict=True)
            ]
            stream.write(format_json_lines(lines))
            stream.flush()
            bar.update(len(batch))
            batch_correct = count_correct(lines)
            if batch_correct is not None:
                correct += batch_correct
                bar.set_postfix_str(f"{correct / (start + len(batch) - done):.3f} right")
    return read_json_lines(answers_file)


@contextlib.contextmanager
def _report_kept_answers(answers_file: Path, questions: Sequence[TaskQuestion]) -> Iterator[None]:
    """Print where the answers are when the user interrupts."""
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
    """Return how many questions a file answers in whole batches; a partial batch is cut off."""
    lines = read_json_lines(answers_file)
    done = len(lines) if len(lines) == len(questions) else len(lines) // batch_size * batch_size
    expected_ids = [question.answer_line["id"] for question in questions[:done]]
    if [line.get("id") for line in lines[:done]] != expected_ids:
        raise UserError(
            f"{answers_file}: holds the answers to other questions; to ask anew, move "
            f"{answers_file.parent} away"
        )
    write_atomically(answers_file, format_json_lines(lines[:done]))
    return done


def _blank_sample(sample: Sample, mean_colour: tuple[float, float, float]) -> Sample:
    images = tuple(blank_image(image, mean_colour) for image in sample.images)
    return replace(sample, images=images)


def _cut_at_stop(text: str, stop: str) -> str:
    return text.split(stop)[0].strip() if stop else text


def open_answers_folder(
    folder: Path,
    task_settings: dict[str, Any],
    held_locks: contextlib.ExitStack,
    is_named: bool = True,
) -> None:
    """Make a folder of answers, or open it again.

    Its lock is held by `held_locks`: no other process writes into it.

    Args:
        folder: The folder.
        task_settings: What is asked, how, and of which model.
        held_locks: Holds the lock of the folder until it is closed.
        is_named: Whether the command names the folder (`out=`), and so could name another.

    Raises:
        UserError: The folder cannot be written, has files of the same names that are not of `eval`,
            or holds answers under settings that differ in more than `FREE_SETTINGS`.
    """
    file = folder / SETTINGS_FILE
    try:
        held_locks.enter_context(hold_folder(folder, f"out={folder}"))
        stored = read_json(file) if file.is_file() else None
        remedy = f"name another out=, or move {folder} away" if is_named else f"move {folder} away"
        if stored is None:
            _refuse_other_files(folder, remedy)
        elif not _holds_answers(folder):
            _remove_scores(folder)
        elif differences := _describe_differences(stored, task_settings):
            raise UserError(
                f"{folder} holds answers under other settings; they differ in "
                f"{', '.join(differences)}. To ask anew, {remedy}"
            )
        if stored != task_settings:
            write_atomically(file, format_json(task_settings, indent=1) + "\n")
    except OSError as error:
        raise explain_unwritable(error, f"out={folder}") from error


def _refuse_other_files(folder: Path, remedy: str) -> None:
    """Refuse a folder without settings in which something of a user's would be overwritten."""
    patterns = (ANSWERS_FILE, BLANK_FILE, SKIPPED_FILE, *SCORE_PATTERNS)
    others = sorted(file.name for pattern in patterns for file in folder.glob(pattern))
    if others:
        raise UserError(
            f"{folder} holds {', '.join(others)} and no {SETTINGS_FILE}, so they are not of this "
            f"eval, which would overwrite them: {remedy}"
        )


def _holds_answers(folder: Path) -> bool:
    return any(read_json_lines(folder / name) for name in (ANSWERS_FILE, BLANK_FILE))


def _remove_scores(folder: Path) -> None:
    """Remove scores of answers that somebody has deleted: they would count as new ones."""
    for pattern in SCORE_PATTERNS:
        for file in folder.glob(pattern):
            file.unlink()


def _describe_differences(stored: dict[str, Any], task_settings: dict[str, Any]) -> list[str]:
    free = {*FREE_SETTINGS, *(key for key in CHECKSUM_SETTINGS if key not in stored)}
    weights = stored.get("weights")
    if weights is not None and weights == task_settings.get("weights"):
        free.add("model")  # a run that was moved, or whose path is written otherwise
    return [
        f"{key} ({stored.get(key)} before, {task_settings.get(key)} now)"
        for key in {**stored, **task_settings}
        if stored.get(key) != task_settings.get(key) and key not in free
    ]
