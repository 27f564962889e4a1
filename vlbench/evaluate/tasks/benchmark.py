"""MMMU and CMMMU as tasks: whose prompts, whose scorer, and a file to submit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlbench.data.sample import Sample
from vlbench.evaluate.tasks.aggregate import summary
from vlbench.evaluate.tasks.benchmark_truths import READ
from vlbench.evaluate.tasks.files import find
from vlbench.evaluate.tasks.items import Item
from vlbench.evaluate.tasks.prompts import generation, prompt
from vlbench.evaluate.tasks.protocols import protocol_of, score_all
from vlbench.evaluate.tasks.record import Generation, Prompt, Record, Skipped
from vlbench.evaluate.tasks.score import SEED, alike, published, table, write
from vlbench.evaluate.tasks.subjects import known_subject
from vlbench.files import json_lines, write_whole
from vlbench.mistakes import Mistake, nearest
from vlbench.model.messages import prompt_ids
from vlbench.model.vlm import VLM
from vlbench.words import whole

HUB = {"mmmu": "MMMU/MMMU", "cmmmu": "m-a-p/CMMMU"}


@dataclass(frozen=True)
class Way:
    """How a benchmark is taken: whose prompts, by task, and whose scorer."""

    prompts: dict[str, str]
    scoring: str


YI = {"mmmu": "yi", "cmmmu": "yi"}
PROTOCOLS = {
    "yi": Way(YI, "yi"),
    # the benchmark CMMMU has a scorer and no prompts: those of Yi are asked
    "official": Way({"mmmu": "official", "cmmmu": "yi"}, "official"),
    "lmms": Way({"mmmu": "lmms", "cmmmu": "lmms"}, "lmms"),
    "strict": Way(YI, "strict"),
    "raw": Way(YI, "raw"),
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
        return {
            "id": record.id,
            "type": record.type,
            "subject": known_subject(record.task, record.subject, record.category),
            "options": list(record.options),
            "answer": list(record.answer) if isinstance(record.answer, tuple) else record.answer,
        }


class Benchmark:
    """`task=mmmu` or `task=cmmmu`, by the protocol and on the split that are given."""

    def __init__(self, task: str, given: dict[str, str]) -> None:
        """Read the records that the keys of `eval` ask for."""
        name = given.get("protocol", "yi")
        if name not in PROTOCOLS:
            known = ", ".join(PROTOCOLS)
            raise Mistake(f"protocol is '{name}'; known are {known}.{nearest(name, PROTOCOLS)}")
        self.task, self.protocol, self.way = task, name, PROTOCOLS[name]
        self.seed = whole(given, "seed", SEED, 0, 2**32 - 1)
        source, split = given.get("data", HUB[task]), given.get("split", "val")
        subjects = given["subjects"].strip("[]").split(",") if "subjects" in given else None
        records = READ[task](source, split, subjects)
        limit = whole(given, "limit", len(records), 1, 10**9)
        if limit < len(records):  # from all over the data, which come subject by subject
            records = [records[number * len(records) // limit] for number in range(limit)]
        self.records = records
        self.label = f"{task}-{split}-{name}"
        self.about = {
            "task": task,
            "split": split,
            "revision": find(source, split).revision(),
            "subjects": subjects,
            "questions": len(records),
            "protocol": name,
        }

    def questions(self, vlm: VLM) -> tuple[list[Question], list[dict[str, str]]]:
        """Return what is asked, and what is not: the protocol leaves it out, or it cannot be.

        A picture that cannot be read, or a text that is too long, is such a reason.
        """
        asked: list[Question] = []
        skipped = []
        for record in self.records:
            made = prompt(record, self.way.prompts[self.task])
            question = None if isinstance(made, Skipped) else Question(record, made)
            reason = _unfit(vlm, question) if question else str(made)
            if reason:
                skipped.append({"id": record.id, "reason": reason})
            elif question:
                asked.append(question)
        return asked, skipped

    def limits(self, vlm: VLM, asked: Sequence[Question]) -> Generation:
        """Return how the protocol lets a model answer."""
        return generation(self.task, self.way.prompts[self.task])

    def right(self, lines: Sequence[dict[str, Any]]) -> int | None:
        """Count right answers; None where the true ones are withheld."""
        items = _items(lines)
        if _withheld(items):
            return None
        return sum(one.correct for one in score_all(self.task, self.way.scoring, items))

    def finish(
        self, folder: Path, lines: list[dict[str, Any]], blind: list[dict[str, Any]], skipped: int
    ) -> list[str]:
        """Write the scores, or the file to submit, and return the lines of the report."""
        items = _items(lines)
        if _withheld(items):
            return self._submit(folder, items)
        scored = score_all(self.task, self.way.scoring, items, self.seed)
        scores: dict[str, Any] = {"task": self.task, "protocol": self.protocol, "seed": self.seed}
        scores |= {**self.about, "skipped": skipped, **summary(self.task, scored)}
        report = [*self._heading(scores), ""]
        if blind:
            unseen = score_all(self.task, self.way.scoring, _items(blind), self.seed)
            scores["blank"] = summary(self.task, unseen)
            report += [f"with blank pictures: {scores['blank']['accuracy']:.3f}", ""]
        write(folder, scores, lines, scored)
        shown = protocol_of(self.task, self.way.scoring).shown
        return [*report, *table(scores, shown), "", *published(scores)]

    def _heading(self, scores: dict[str, Any]) -> list[str]:
        """Say what was asked how, and what was left out."""
        prompts = self.way.prompts[self.task]
        lines = [
            f"{self.task} {scores['split']}, {scores['revision']}: prompts of {prompts}, scored as "
            f"{self.way.scoring}; {scores['n']} questions asked, {scores['skipped']} not "
            "(skipped.jsonl)"
        ]
        differs = generation(self.task, prompts).differs
        lines += [f"not as the reference: {differs}"] if differs else []
        return lines + alike([record.id for record in self.records])

    def _submit(self, folder: Path, items: list[Item]) -> list[str]:
        """Write the file that the benchmark's server takes, as the answers are withheld here.

        MMMU: `{id: letter or text}`; CMMMU: a line per question with its response.
        """
        if self.task == "mmmu":
            # a letter does not need the truth to be read; an open answer is read by the server
            blank = [replace(item, answer="") for item in items]
            scored = score_all(self.task, self.way.scoring, blank)
            told: dict[str | int, Any] = {}
            for one in scored:  # of equal ids the first counts
                letter = one.prediction if one.item.type == "multiple-choice" else None
                told.setdefault(one.item.id, letter or one.item.response)
            text = json.dumps(told, ensure_ascii=False, indent=1)
            file = folder / "submission.json"
        else:
            text = json_lines({"id": i.id, "type": i.type, "response": i.response} for i in items)
            file = folder / "submission.jsonl"
        write_whole(file, text)
        count = len({one.id for one in items}) if self.task == "mmmu" else len(items)
        several = len(items) - count
        lost = f" ({several} more have an id that another has, and are not in it)"
        return [
            f"{self.task}: the answers are withheld; {count} responses to submit in {file}"
            + (lost if several else "")
        ]


def _unfit(vlm: VLM, question: Question) -> str:
    """Say why a question cannot be put to the model, "" if it can."""
    try:
        for picture in question.prompt.pictures:
            picture.open()
        prompt_ids(vlm, question.sample)
    except Mistake as mistake:
        return str(mistake)
    return ""


def _withheld(items: Sequence[Item]) -> bool:
    return any(item.answer is None for item in items)


def _items(lines: Sequence[dict[str, Any]]) -> list[Item]:
    keys = ("id", "type", "options", "answer", "response", "subject")
    return [Item(**{key: line[key] for key in keys}) for line in lines]
