"""Conversations with known answers as tasks: a run's own questions, or a file in LLaVA's layout."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlbench import recipe as recipes
from vlbench.data.llava import LlavaJson
from vlbench.data.record import ROLES
from vlbench.data.sample import Sample
from vlbench.evaluate.ask import SPARE
from vlbench.evaluate.measures import exact, overlap, vqa_accuracy
from vlbench.evaluate.questions import LeftOut, Question, look_through, told, told_apart
from vlbench.evaluate.results import questions_of, spread
from vlbench.evaluate.tasks.aggregate import wilson
from vlbench.evaluate.tasks.record import Generation
from vlbench.files import json_lines, write_whole
from vlbench.mistakes import BadSample, Mistake
from vlbench.model.messages import prompt_ids
from vlbench.model.vlm import VLM
from vlbench.train import checkpoint
from vlbench.train.restore import released
from vlbench.words import whole

OWN, FILE = "own", "llava_json"
Line = dict[str, Any]
People = dict[tuple[str, int], tuple[str, ...]]


@dataclass(frozen=True)
class Known:
    """A question, the set it belongs to, and its right answers."""

    question: Question
    set: str
    answers: tuple[str, ...]
    """One, or those of several people."""

    @property
    def sample(self) -> Sample:
        """The conversation that ends with the question."""
        return self.question.sample

    @property
    def line(self) -> Line:
        """What stands in answers.jsonl, but for the response."""
        asked = self.question
        return {
            "id": asked.sample.id,
            "record": asked.record,
            "set": self.set,
            "type": asked.type,
            "language": asked.language,
            "answer": list(self.answers),
        }


def _sets(task: str, given: dict[str, str]) -> tuple[list[Known], list[LeftOut]]:
    """Return the questions of `own`, or of the file `data=`, and what of that is left out."""
    people: People = {}
    left_out: list[LeftOut] = []
    if task == FILE:
        source = LlavaJson(given["data"], given.get("images"))
        people = _people(source)
        questions, left_out = look_through(source, 100 * len(source))
        sets = {source.name: told_apart(questions)}
    else:
        if not checkpoint.holds(Path(given["run"])):
            released(given["run"], "run")
            raise Mistake(f"{given['run']} is no run: eval needs data=FILE.json (images=FOLDER)")
        recipe = recipes.load_file(checkpoint.find(Path(given["run"])) / "recipe.yaml")
        name, questions, unseen = questions_of(recipe)
        sets = {name: questions, "unseen pairs": unseen}
    first = next(iter(sets))
    if not sets[first]:
        why = f" ({told(left_out)})" if left_out else ""
        raise Mistake(f"{first} holds no sample with an image that could be asked about{why}")
    known = [
        Known(one, name, people.get((one.record, len(one.sample.turns)), (one.answer,)))
        for name, asked in sets.items()
        for one in asked
    ]
    return known, left_out


def _people(source: LlavaJson) -> People:
    """Return what several people answered, by record and turn: the `answers` of those records.

    VQAv2 gives ten, as texts or as `{"answer": text}`. They belong to a record's last question;
    where no assistant turn answers it, the answer of most stands in.
    """
    found = {}
    for index, record in enumerate(source.records):
        if not isinstance(record, dict) or "answers" not in record:
            continue
        given = record["answers"] if isinstance(record["answers"], list) else []
        told = [one.get("answer") if isinstance(one, dict) else one for one in given]
        texts = [one for one in told if isinstance(one, str) and one.strip()]
        if not texts or len(texts) < len(told):
            name = record.get("id", f"record {index + 1}")
            raise Mistake(f"{source.name}: {name}: 'answers' must be a list of texts")
        turns: Any = record.get("conversations")
        last = turns[-1] if isinstance(turns, list) and turns else None
        if isinstance(last, dict) and ROLES.get(last.get("from", "")) == "human":
            most = {"from": "gpt", "value": Counter(texts).most_common(1)[0][0]}
            source.records[index] = {**record, "conversations": [*turns, most]}
        try:
            sample = source[index]
        except BadSample:
            continue  # look_through counts and names it
        found[str(index + 1), len(sample.turns) - 1] = tuple(texts)
    return found


class Conversations:
    """`task=own`, the questions of a run, or `task=llava_json data=FILE.json images=FOLDER`."""

    def __init__(self, task: str, given: dict[str, str]) -> None:
        """Read the questions that the keys of `eval` ask for."""
        given = {key: str(Path(value).expanduser()) for key, value in given.items()}
        asked, self.left_out = _sets(task, given)
        limit = whole(given, "limit", len(asked), 1, 10**9)
        self.asked = spread(asked, limit)
        self.label = task if task == OWN else f"{task}-{Path(given['data']).stem}"
        sets = Counter(one.set for one in self.asked)
        texts = [(one.sample.id, one.question.text, one.answers) for one in self.asked]
        whole_text = json.dumps(texts, ensure_ascii=False).encode()
        sha256 = hashlib.sha256(whole_text).hexdigest()
        self.about = {"task": task, "questions": dict(sets), "revision": f"sha256 {sha256[:16]}"}

    def questions(self, vlm: VLM) -> tuple[list[Known], list[dict[str, str]]]:
        """Return what is asked, by length, so that little of a batch is padding; and what is not.

        That are records without a picture, bad ones, and texts that are too long for the language
        model.
        """
        lengths: dict[int, int] = {}
        skipped = [{**vars(one), "record": str(one.record)} for one in self.left_out]
        for number, one in enumerate(self.asked):
            try:
                lengths[number] = len(prompt_ids(vlm, one.sample))
            except Mistake as mistake:
                where = {"id": one.sample.id, "record": one.question.record}
                skipped.append({**where, "reason": str(mistake)})
        return [self.asked[number] for number in sorted(lengths, key=lengths.__getitem__)], skipped

    def limits(self, vlm: VLM, asked: Sequence[Known]) -> Generation:
        """Return how long an answer may be: the longest right one and a little; more is wrong."""
        answers = (answer for one in asked for answer in one.answers)
        longest = max(len(vlm.tokenizer.encode(f" {answer}\n###")) for answer in answers)
        return Generation(longest + SPARE)

    def right(self, lines: Sequence[Line]) -> int:
        """Count the answers that are right word for word."""
        return sum(exact(line["response"], line["answer"]) for line in lines)

    def finish(self, folder: Path, lines: list[Line], blind: list[Line], skipped: int) -> list[str]:
        """Write scores.json and scored.jsonl, and return the lines of the report."""
        judged = [_judged(line) for line in lines]
        sets = _by_set(judged)
        scores = {**self.about, "skipped": skipped, "sets": sets}
        report = table(sets)
        report += self._not_asked(skipped)
        if blind:
            unseen = scores["blank"] = _by_set([_judged(line) for line in blind])
            shares = (f"{name} {one['accuracy']:.3f}" for name, one in unseen.items())
            report.append(f"with blank pictures: {', '.join(shares)}")
        write_whole(folder / "scored.jsonl", json_lines(judged))
        text = json.dumps(scores, indent=1, ensure_ascii=False)
        write_whole(folder / "scores.json", f"{text}\n")
        return report

    def _not_asked(self, skipped: int) -> list[str]:
        """Say how many records and questions were left out, and the first of each kind."""
        long = skipped - len(self.left_out)
        several = [f"{long} questions that are too long"] if long else []
        parts = ([told(self.left_out)] if self.left_out else []) + several
        return [f"not asked: {'; '.join(parts)} (skipped.jsonl)"] if parts else []


def _by_set(judged: Sequence[Line]) -> dict[str, Any]:
    names = dict.fromkeys(one["set"] for one in judged)
    return {name: summary([one for one in judged if one["set"] == name]) for name in names}


def _judged(line: Line) -> Line:
    """Return a line with its verdicts, as in scored.jsonl."""
    response, answers = line["response"], line["answer"]
    verdicts = {"correct": exact(response, answers), "vqa": vqa_accuracy(response, answers)}
    return {**line, **verdicts}


def summary(judged: Sequence[Line]) -> dict[str, Any]:
    """Return what stands in scores.json of one set, by type and language where they are known."""
    return {
        **_share(judged),
        **overlap([one["response"] for one in judged], [one["answer"] for one in judged]),
        "by_type": _groups(judged, lambda one: one["type"]),
        "by_language": _groups(judged, lambda one: one["language"]),
    }


def _groups(judged: Sequence[Line], key: Callable[[Line], str]) -> dict[str, Any]:
    names = sorted({key(one) for one in judged} - {""})
    return {name: _share([one for one in judged if key(one) == name]) for name in names}


def _share(judged: Sequence[Line]) -> dict[str, Any]:
    n, correct = len(judged), sum(one["correct"] for one in judged)
    return {
        "n": n,
        "correct": correct,
        "accuracy": correct / n,
        "interval": [round(end, 4) for end in wilson(correct, n)],
        "vqa_accuracy": round(sum(one["vqa"] for one in judged) / n, 6),
    }


def table(sets: dict[str, Any]) -> list[str]:
    """Return lines on every set, its types and its languages."""
    lines = []
    for name, one in sets.items():
        low, high = one["interval"]
        lines += [
            f"{name}: {one['accuracy']:.3f} of {one['n']} questions right, word for word "
            f"(95 % {low:.3f} to {high:.3f})",
            f"  VQA accuracy {one['vqa_accuracy']:.3f}, F1 of words {one['f1']:.1f}, chrF "
            f"{one['chrf']:.1f}",
        ]
        for kind in ("type", "language"):
            groups = one[f"by_{kind}"]
            if groups:
                shares = ", ".join(f"{key} {part['accuracy']:.3f}" for key, part in groups.items())
                lines.append(f"  by {kind}: {shares}")
    return lines
