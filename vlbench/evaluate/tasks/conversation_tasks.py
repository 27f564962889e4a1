"""Conversations with known answers as tasks: a run's own questions, or a file in LLaVA's layout."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlbench.command_line.arguments import EvalArguments
from vlbench.config import recipe as recipes
from vlbench.data.conversation_files import LlavaJson
from vlbench.data.conversation_record import ROLE_ALIASES
from vlbench.data.sample import Sample
from vlbench.errors import BadSample, UserError
from vlbench.evaluate.answer_metrics import is_exact_match, text_overlap, vqa_accuracy
from vlbench.evaluate.batched_answers import EXTRA_TOKENS
from vlbench.evaluate.heldout_questions import (
    EvalQuestion,
    LeftOutRecord,
    collect_questions,
    describe_left_out,
    make_ids_unique,
)
from vlbench.evaluate.run_results import final_questions, pick_fixed_subset
from vlbench.evaluate.tasks.benchmark_types import GenerationLimits
from vlbench.evaluate.tasks.score_summary import wilson_interval
from vlbench.model.generation.chat_messages import encode_prompt
from vlbench.model.vlm import VLM
from vlbench.text_files import format_json_lines, write_atomically
from vlbench.train import checkpoint_files
from vlbench.train.resume import find_released_model

OWN_TASK, FILE_TASK = "own", "llava_json"
AnswerLine = dict[str, Any]
HumanAnswers = dict[tuple[str, int], tuple[str, ...]]


@dataclass(frozen=True)
class ConversationQuestion:
    """A question, the set it belongs to, and its right answers."""

    question: EvalQuestion
    set_name: str
    true_answers: tuple[str, ...]
    """One, or those of several people."""

    @property
    def sample(self) -> Sample:
        """The conversation that ends with the question."""
        return self.question.sample

    @property
    def answer_line(self) -> AnswerLine:
        """What stands in answers.jsonl, but for the response."""
        asked = self.question
        return {
            "id": asked.sample.id,
            "record": asked.record_number,
            "set": self.set_name,
            "type": asked.type,
            "language": asked.language,
            "answer": list(self.true_answers),
        }


def _load_questions(
    task: str, arguments: EvalArguments
) -> tuple[list[ConversationQuestion], list[LeftOutRecord]]:
    """Return the questions of `own`, or of the file `data=`, and the records that are left out."""
    people: HumanAnswers = {}
    left_out: list[LeftOutRecord] = []
    if task == FILE_TASK:
        if arguments.data is None:
            raise UserError(f"task={FILE_TASK} needs data=FILE.json")
        source = LlavaJson(arguments.data, arguments.images)
        people = _collect_human_answers(source)
        questions, left_out = collect_questions(source, 100 * len(source))
        sets = {source.name: make_ids_unique(questions)}
    else:
        run = Path(arguments.model)
        if not checkpoint_files.is_run_or_checkpoint(run):
            find_released_model(arguments.model, "model")
            raise UserError(f"{run} is no run: eval needs data=FILE.json (images=FOLDER)")
        recipe = recipes.load_recipe_file(checkpoint_files.find_checkpoint(run) / "recipe.yaml")
        name, questions, unseen = final_questions(recipe)
        sets = {name: questions, "unseen pairs": unseen}
    first = next(iter(sets))
    if not sets[first]:
        why = f" ({describe_left_out(left_out)})" if left_out else ""
        raise UserError(f"{first} holds no sample with an image that could be asked about{why}")
    known = [
        ConversationQuestion(
            one, name, people.get((one.record_number, len(one.sample.turns)), (one.answer,))
        )
        for name, asked in sets.items()
        for one in asked
    ]
    return known, left_out


def _collect_human_answers(source: LlavaJson) -> HumanAnswers:
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
            raise UserError(f"{source.name}: {name}: 'answers' must be a list of texts")
        turns: Any = record.get("conversations")
        last = turns[-1] if isinstance(turns, list) and turns else None
        if isinstance(last, dict) and ROLE_ALIASES.get(last.get("from", "")) == "human":
            most = {"from": "gpt", "value": Counter(texts).most_common(1)[0][0]}
            source.records[index] = {**record, "conversations": [*turns, most]}
        try:
            sample = source[index]
        except BadSample:
            continue  # look_through counts and names it
        found[str(index + 1), len(sample.turns) - 1] = tuple(texts)
    return found


class ConversationTask:
    """`task=own`, the questions of a run, or `task=llava_json data=FILE.json images=FOLDER`."""

    def __init__(self, task: str, arguments: EvalArguments) -> None:
        """Read the questions that the arguments of `eval` ask for."""
        asked, self.left_out_records = _load_questions(task, arguments)
        self.all_questions = pick_fixed_subset(asked, arguments.limit)
        self.folder_name = f"{task}-{Path(arguments.data).stem}" if arguments.data else task
        sets = Counter(one.set_name for one in self.all_questions)
        texts = [
            (one.sample.id, one.question.question_text, one.true_answers)
            for one in self.all_questions
        ]
        whole_text = json.dumps(texts, ensure_ascii=False).encode()
        sha256 = hashlib.sha256(whole_text).hexdigest()
        self.task_settings = {
            "task": task,
            "questions": dict(sets),
            "revision": f"sha256 {sha256[:16]}",
        }

    def select_questions(self, vlm: VLM) -> tuple[list[ConversationQuestion], list[dict[str, str]]]:
        """Return what is asked, by length, so that little of a batch is padding; and what is not.

        That are records without a picture, bad ones, and texts that are too long for the language
        model.
        """
        lengths: dict[int, int] = {}
        skipped = [{**vars(one), "record": str(one.record)} for one in self.left_out_records]
        for number, one in enumerate(self.all_questions):
            try:
                lengths[number] = len(encode_prompt(vlm, one.sample))
            except UserError as mistake:
                where = {"id": one.sample.id, "record": one.question.record_number}
                skipped.append({**where, "reason": str(mistake)})
        return [
            self.all_questions[number] for number in sorted(lengths, key=lengths.__getitem__)
        ], skipped

    def generation_limits(
        self, vlm: VLM, questions: Sequence[ConversationQuestion]
    ) -> GenerationLimits:
        """Return how long an answer may be: the longest right one and a little; more is wrong."""
        answers = (answer for one in questions for answer in one.true_answers)
        longest = max(len(vlm.tokenizer.encode(f" {answer}\n###")) for answer in answers)
        return GenerationLimits(longest + EXTRA_TOKENS)

    def count_correct(self, answer_lines: Sequence[AnswerLine]) -> int:
        """Count the answers that are right word for word."""
        return sum(is_exact_match(line["response"], line["answer"]) for line in answer_lines)

    def write_scores(
        self,
        folder: Path,
        answer_lines: list[AnswerLine],
        blank_lines: list[AnswerLine],
        skipped_count: int,
    ) -> list[str]:
        """Write scores.json and scored.jsonl, and return the lines of the report."""
        judged = [_judge_line(line) for line in answer_lines]
        sets = _summarize_sets(judged)
        scores = {**self.task_settings, "skipped": skipped_count, "sets": sets}
        report = format_set_table(sets)
        report += self._describe_skipped(skipped_count)
        if blank_lines:
            unseen = scores["blank"] = _summarize_sets([_judge_line(line) for line in blank_lines])
            shares = (f"{name} {one['accuracy']:.3f}" for name, one in unseen.items())
            report.append(f"with blank pictures: {', '.join(shares)}")
        write_atomically(folder / "scored.jsonl", format_json_lines(judged))
        text = json.dumps(scores, indent=1, ensure_ascii=False)
        write_atomically(folder / "scores.json", f"{text}\n")
        return report

    def _describe_skipped(self, skipped_count: int) -> list[str]:
        """Say how many records and questions were left out, and the first of each kind."""
        long = skipped_count - len(self.left_out_records)
        several = [f"{long} questions that are too long"] if long else []
        parts = (
            [describe_left_out(self.left_out_records)] if self.left_out_records else []
        ) + several
        return [f"not asked: {'; '.join(parts)} (skipped.jsonl)"] if parts else []


def _summarize_sets(judged_lines: Sequence[AnswerLine]) -> dict[str, Any]:
    names = dict.fromkeys(one["set"] for one in judged_lines)
    return {
        name: summarize_set([one for one in judged_lines if one["set"] == name]) for name in names
    }


def _judge_line(answer_line: AnswerLine) -> AnswerLine:
    """Return a line with its verdicts, as in scored.jsonl."""
    response, answers = answer_line["response"], answer_line["answer"]
    verdicts = {
        "correct": is_exact_match(response, answers),
        "vqa": vqa_accuracy(response, answers),
    }
    return {**answer_line, **verdicts}


def summarize_set(judged_lines: Sequence[AnswerLine]) -> dict[str, Any]:
    """Return what stands in scores.json of one set, by type and language where they are known."""
    return {
        **_accuracy_of_lines(judged_lines),
        **text_overlap(
            [one["response"] for one in judged_lines], [one["answer"] for one in judged_lines]
        ),
        "by_type": _accuracy_by_group(judged_lines, lambda one: one["type"]),
        "by_language": _accuracy_by_group(judged_lines, lambda one: one["language"]),
    }


def _accuracy_by_group(
    judged_lines: Sequence[AnswerLine], group_of: Callable[[AnswerLine], str]
) -> dict[str, Any]:
    names = sorted({group_of(one) for one in judged_lines} - {""})
    return {
        name: _accuracy_of_lines([one for one in judged_lines if group_of(one) == name])
        for name in names
    }


def _accuracy_of_lines(judged_lines: Sequence[AnswerLine]) -> dict[str, Any]:
    n, correct = len(judged_lines), sum(one["correct"] for one in judged_lines)
    return {
        "n": n,
        "correct": correct,
        "accuracy": correct / n,
        "interval": [round(end, 4) for end in wilson_interval(correct, n)],
        "vqa_accuracy": round(sum(one["vqa"] for one in judged_lines) / n, 6),
    }


def format_set_table(set_scores: dict[str, Any]) -> list[str]:
    """Return lines on every set, its types and its languages."""
    lines = []
    for name, one in set_scores.items():
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
