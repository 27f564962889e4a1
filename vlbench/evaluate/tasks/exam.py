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

from vlbench.data.images import blank
from vlbench.data.sample import Sample
from vlbench.evaluate.tasks.record import Generation
from vlbench.files import json_lines, read_json, read_json_lines, write_whole
from vlbench.mistakes import Mistake
from vlbench.model.generate import answer_text
from vlbench.model.messages import prompt_batch
from vlbench.model.vlm import VLM

ANSWERS, BLANK, SKIPPED, EXAM = "answers.jsonl", "blank.jsonl", "skipped.jsonl", "exam.json"


class Asked(Protocol):
    """What `take` needs of a question."""

    @property
    def sample(self) -> Sample:
        """The conversation that ends with the question."""
        ...

    @property
    def line(self) -> dict[str, Any]:
        """What stands in answers.jsonl, `id` first, but for the response."""
        ...


def take(
    vlm: VLM,
    asked: Sequence[Asked],
    limits: Generation,
    right: Callable[[list[dict[str, Any]]], int | None],
    batch: int,
    file: Path,
    blind: bool = False,
) -> list[dict[str, Any]]:
    """Ask what `file` does not answer yet, and return all its lines; they are kept as they come.

    `batch` questions are answered at once. `right` counts the right answers among new lines for
    the progress bar, if they are known. `blind` shows blank pictures instead.
    """
    done = _whole_batches(file, asked, batch)
    correct = 0
    with (
        _kept(file, asked),
        tqdm(total=len(asked), initial=done, desc=file.stem, unit="question", disable=None) as bar,
        file.open("a", encoding="utf-8") as kept,
    ):
        for first in range(done, len(asked), batch):
            some = asked[first : first + batch]
            samples = [_blind(vlm, one.sample) if blind else one.sample for one in some]
            new = vlm.generate(prompt_batch(vlm, samples), max_new_tokens=limits.max_new_tokens)
            texts = [_cut(answer_text(vlm, ids), limits.stop) for ids in new]
            lines = [{**one.line, "response": text} for one, text in zip(some, texts, strict=True)]
            kept.write(json_lines(lines))
            kept.flush()
            bar.update(len(some))
            counted = right(lines)
            if counted is not None:
                correct += counted
                bar.set_postfix_str(f"{correct / (first + len(some) - done):.3f} right")
    return read_json_lines(file)


@contextlib.contextmanager
def _kept(file: Path, asked: Sequence[Asked]) -> Iterator[None]:
    """Say where the answers are when somebody interrupts."""
    try:
        yield
    except KeyboardInterrupt:
        count = len(read_json_lines(file))
        print(
            f"\n{count} of {len(asked)} answers are kept in {file}; the same command goes on",
            file=sys.stderr,
        )
        raise


def _whole_batches(file: Path, asked: Sequence[Asked], batch: int) -> int:
    """Return how many questions `file` answers in whole batches; a torn batch is cut off."""
    whole = read_json_lines(file)
    done = len(whole) if len(whole) == len(asked) else len(whole) // batch * batch
    if [line.get("id") for line in whole[:done]] != [one.line["id"] for one in asked[:done]]:
        raise Mistake(f"{file}: holds the answers to other questions; name another out=")
    write_whole(file, json_lines(whole[:done]))
    return done


def _blind(vlm: VLM, sample: Sample) -> Sample:
    pictures = tuple(blank(picture, vlm.transform.mean) for picture in sample.pictures)
    return replace(sample, pictures=pictures)


def _cut(text: str, stop: str) -> str:
    return text.split(stop)[0].strip() if stop else text


def open_folder(folder: Path, about: dict[str, Any]) -> None:
    """Make the folder of an exam, or go on with the same exam; a Mistake for another one."""
    file = folder / EXAM
    if file.is_file():
        before = read_json(file)
        differ = [
            f"{key} ({before.get(key)} before, {value} now)"
            for key, value in about.items()
            if before.get(key) != value
        ]
        if differ:
            raise Mistake(f"out={folder} is another exam; it differs in {', '.join(differ)}")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise Mistake(f"out={folder} cannot be written ({error.strerror})") from error
