"""A model takes a benchmark: asked by a protocol, batch by batch, answers kept as they come.

A folder of an exam holds

    exam.json       what is asked, by which protocol, of which model: another exam is refused
    answers.jsonl   a line per question, which `score` reads
    blank.jsonl     the same with blank pictures, on request
    skipped.jsonl   questions that are not asked, and why
    scores.json scored.jsonl report.txt, or submission.* where the answers are withheld

A batch is always the same questions, so an exam that was stopped ends as if it had not been.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlbench.data.images import blank
from vlbench.data.sample import Sample
from vlbench.evaluate.tasks.items import Item
from vlbench.evaluate.tasks.prompts import generation, prompt
from vlbench.evaluate.tasks.protocols import score_all
from vlbench.evaluate.tasks.record import Prompt, Record, Skipped
from vlbench.evaluate.tasks.subjects import SUBJECTS, UNKNOWN
from vlbench.files import json_lines, read_json, read_text, write_whole
from vlbench.mistakes import Mistake
from vlbench.model.generate import answer_text
from vlbench.model.messages import prompt_batch, prompt_ids
from vlbench.model.vlm import VLM

ANSWERS, BLANK, SKIPPED, EXAM = "answers.jsonl", "blank.jsonl", "skipped.jsonl", "exam.json"


@dataclass(frozen=True)
class Protocol:
    """How a benchmark is taken: whose prompts, by task, and whose scorer."""

    prompts: dict[str, str]
    scoring: str


YI = {"mmmu": "yi", "cmmmu": "yi"}
PROTOCOLS = {
    "yi": Protocol(YI, "yi"),
    # the benchmark CMMMU has a scorer and no prompts: those of Yi are asked
    "official": Protocol({"mmmu": "official", "cmmmu": "yi"}, "official"),
    "lmms": Protocol({"mmmu": "lmms", "cmmmu": "lmms"}, "lmms"),
    "strict": Protocol(YI, "strict"),
    "raw": Protocol(YI, "raw"),
}


@dataclass(frozen=True)
class Question:
    """A record, and what the model is asked about it."""

    record: Record
    prompt: Prompt

    @property
    def sample(self) -> Sample:
        """The conversation that ends with the question."""
        return Sample(self.record.id, (self.prompt.turn,), self.prompt.pictures)

    @property
    def line(self) -> dict[str, Any]:
        """What stands in answers.jsonl, but for the response."""
        record = self.record
        known = SUBJECTS[record.task].domain(record.subject) != UNKNOWN
        return {
            "id": record.id,
            "type": record.type,
            "subject": record.subject if known else record.category,
            "options": list(record.options),
            "answer": list(record.answer) if isinstance(record.answer, tuple) else record.answer,
        }


def questions(
    vlm: VLM, records: Sequence[Record], prompts: str
) -> tuple[list[Question], list[dict[str, str]]]:
    """Return what is asked, and what is not with the reason: by the protocol, or as it cannot be.

    A picture that cannot be read, or a text that is too long, is such a reason.
    """
    asked: list[Question] = []
    skipped = []
    for record in records:
        made = prompt(record, prompts)
        reason = made.reason if isinstance(made, Skipped) else _unfit(vlm, Question(record, made))
        if reason:
            skipped.append({"id": record.id, "reason": reason})
        elif isinstance(made, Prompt):
            asked.append(Question(record, made))
    return asked, skipped


def _unfit(vlm: VLM, question: Question) -> str:
    """Say why a question cannot be put to the model, "" if it can."""
    try:
        for picture in question.prompt.pictures:
            picture.open()
        prompt_ids(vlm, question.sample)
    except Mistake as mistake:
        return str(mistake)
    return ""


def take(
    vlm: VLM,
    asked: Sequence[Question],
    task: str,
    protocol: Protocol,
    batch: int,
    file: Path,
    blind: bool = False,
) -> list[Item]:
    """Ask what `file` does not answer yet, and return all answers; they are kept as they come.

    `batch` questions are answered at once. `blind` shows blank pictures instead.
    """
    limits = generation(task, protocol.prompts[task])
    done = _whole_batches(file, asked, batch)
    right, known = 0, all(one.record.answer is not None for one in asked)
    with (
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
            if known:
                scored = score_all(task, protocol.scoring, _items(lines))
                right += sum(one.correct for one in scored)
                bar.set_postfix_str(f"{right / (first + len(some) - done):.3f} right")
    return _items([json.loads(line) for line in read_text(file).splitlines()])


def _whole_batches(file: Path, asked: Sequence[Question], batch: int) -> int:
    """Return how many questions `file` answers in whole batches; a torn batch is cut off."""
    kept = file.read_bytes().decode(errors="replace") if file.is_file() else ""
    lines = kept.split("\n")
    whole = [line for line in lines if line.endswith("}")]
    done = len(whole) if len(whole) == len(asked) else len(whole) // batch * batch
    ids = [json.loads(line)["id"] for line in whole[:done]]
    if ids != [one.record.id for one in asked[:done]]:
        raise Mistake(f"{file}: holds the answers to other questions; name another out=")
    write_whole(file, "".join(f"{line}\n" for line in whole[:done]))
    return done


def _blind(vlm: VLM, sample: Sample) -> Sample:
    pictures = tuple(blank(picture, vlm.transform.mean) for picture in sample.pictures)
    return replace(sample, pictures=pictures)


def _cut(text: str, stop: str) -> str:
    return text.split(stop)[0].strip() if stop else text


def _items(lines: Sequence[dict[str, Any]]) -> list[Item]:
    keys = ("id", "type", "options", "answer", "response", "subject")
    return [Item(**{key: line[key] for key in keys}) for line in lines]


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
