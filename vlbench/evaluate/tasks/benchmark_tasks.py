"""MMMU and CMMMU as tasks: whose prompts, whose scorer, and a file to submit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlbench.command_line.arguments import BENCHMARK_SEED, EvalArguments, ProtocolName
from vlbench.data.sample import Sample
from vlbench.errors import UserError
from vlbench.evaluate.tasks.benchmark_files import find_split
from vlbench.evaluate.tasks.benchmark_truths import RECORD_READERS
from vlbench.evaluate.tasks.benchmark_types import (
    BenchmarkPrompt,
    BenchmarkRecord,
    GenerationLimits,
    SkippedRecord,
)
from vlbench.evaluate.tasks.prompt_table import prompt_or_skip, protocol_limits
from vlbench.evaluate.tasks.score_command import (
    format_published,
    format_score_table,
    report_equal_ids,
    write_score_files,
)
from vlbench.evaluate.tasks.score_summary import summarize_scores
from vlbench.evaluate.tasks.scored_items import AnsweredItem
from vlbench.evaluate.tasks.scoring_protocols import score_items, scoring_protocol
from vlbench.evaluate.tasks.subject_domains import subject_or_category
from vlbench.model.generation.chat_messages import encode_prompt
from vlbench.model.vlm import VLM
from vlbench.text_files import format_json_lines, write_atomically

HUB_DATASETS = {"mmmu": "MMMU/MMMU", "cmmmu": "m-a-p/CMMMU"}


@dataclass(frozen=True)
class EvalProtocol:
    """How a benchmark is taken: whose prompts, by task, and whose scorer."""

    prompt_protocols: dict[str, str]
    scoring_protocol: str


YI_PROMPTS = {"mmmu": "yi", "cmmmu": "yi"}
EVAL_PROTOCOLS: dict[ProtocolName, EvalProtocol] = {
    "yi": EvalProtocol(YI_PROMPTS, "yi"),
    # the benchmark CMMMU has a scorer and no prompts: those of Yi are asked
    "official": EvalProtocol({"mmmu": "official", "cmmmu": "yi"}, "official"),
    "lmms": EvalProtocol({"mmmu": "lmms", "cmmmu": "lmms"}, "lmms"),
    "strict": EvalProtocol(YI_PROMPTS, "strict"),
    "raw": EvalProtocol(YI_PROMPTS, "raw"),
}


@dataclass(frozen=True)
class BenchmarkQuestion:
    """A record, and what the model is asked about it."""

    record: BenchmarkRecord
    prompt: BenchmarkPrompt

    @property
    def sample(self) -> Sample:
        """The conversation that ends with the question."""
        return Sample(self.record.id, (self.prompt.user_turn,), self.prompt.images)

    @property
    def answer_line(self) -> dict[str, Any]:
        """What stands in answers.jsonl, but for the response."""
        record = self.record
        return {
            "id": record.id,
            "type": record.type,
            "subject": subject_or_category(record.task, record.subject, record.category),
            "options": list(record.options),
            "answer": list(record.answer) if isinstance(record.answer, tuple) else record.answer,
        }


class BenchmarkTask:
    """`task=mmmu` or `task=cmmmu`, by the protocol and on the split that are given."""

    def __init__(self, task: str, arguments: EvalArguments) -> None:
        """Read the records that the arguments of `eval` ask for."""
        name = arguments.protocol or "yi"
        self.task, self.protocol_name, self.eval_protocol = task, name, EVAL_PROTOCOLS[name]
        self.seed = BENCHMARK_SEED if arguments.seed is None else arguments.seed
        source, split = arguments.data or HUB_DATASETS[task], arguments.split or "val"
        subjects = arguments.subjects.strip("[]").split(",") if arguments.subjects else None
        records = RECORD_READERS[task](source, split, subjects)
        limit = arguments.limit or len(records)
        if limit < len(records):  # evenly from the data, which come subject by subject
            records = [records[number * len(records) // limit] for number in range(limit)]
        self.records = records
        self.folder_name = f"{task}-{split}-{name}"
        self.task_settings = {
            "task": task,
            "split": split,
            "revision": find_split(source, split).data_revision(),
            "subjects": subjects,
            "questions": len(records),
            "protocol": name,
        }

    def select_questions(self, vlm: VLM) -> tuple[list[BenchmarkQuestion], list[dict[str, str]]]:
        """Return what is asked, and what is not: the protocol leaves it out, or it cannot be.

        A picture that cannot be read, or a text that is too long, is such a reason.
        """
        asked: list[BenchmarkQuestion] = []
        skipped = []
        for record in self.records:
            made = prompt_or_skip(record, self.eval_protocol.prompt_protocols[self.task])
            question = None if isinstance(made, SkippedRecord) else BenchmarkQuestion(record, made)
            reason = _unfit_reason(vlm, question) if question else str(made)
            if reason:
                skipped.append({"id": record.id, "reason": reason})
            elif question:
                asked.append(question)
        return asked, skipped

    def generation_limits(
        self, vlm: VLM, questions: Sequence[BenchmarkQuestion]
    ) -> GenerationLimits:
        """Return how the protocol lets a model answer."""
        return protocol_limits(self.task, self.eval_protocol.prompt_protocols[self.task])

    def count_correct(self, answer_lines: Sequence[dict[str, Any]]) -> int | None:
        """Count right answers; None where the true ones are withheld."""
        items = _items_from_lines(answer_lines)
        if _is_withheld(items):
            return None
        return sum(
            one.correct
            for one in score_items(self.task, self.eval_protocol.scoring_protocol, items)
        )

    def write_scores(
        self,
        folder: Path,
        answer_lines: list[dict[str, Any]],
        blank_lines: list[dict[str, Any]],
        skipped_count: int,
    ) -> list[str]:
        """Write the scores, or the file to submit, and return the lines of the report."""
        items = _items_from_lines(answer_lines)
        if _is_withheld(items):
            return self._write_submission(folder, items)
        scored = score_items(self.task, self.eval_protocol.scoring_protocol, items, self.seed)
        scores: dict[str, Any] = {
            "task": self.task,
            "protocol": self.protocol_name,
            "seed": self.seed,
        }
        scores |= {
            **self.task_settings,
            "skipped": skipped_count,
            **summarize_scores(self.task, scored),
        }
        report = [*self._report_heading(scores), ""]
        if blank_lines:
            unseen = score_items(
                self.task,
                self.eval_protocol.scoring_protocol,
                _items_from_lines(blank_lines),
                self.seed,
            )
            scores["blank"] = summarize_scores(self.task, unseen)
            report += [f"with blank pictures: {scores['blank']['accuracy']:.3f}", ""]
        write_score_files(folder, scores, answer_lines, scored)
        shown = scoring_protocol(self.task, self.eval_protocol.scoring_protocol).accuracy_format
        return [*report, *format_score_table(scores, shown), "", *format_published(scores)]

    def _report_heading(self, scores: dict[str, Any]) -> list[str]:
        """Say what was asked how, and what was left out."""
        prompts = self.eval_protocol.prompt_protocols[self.task]
        lines = [
            f"{self.task} {scores['split']}, {scores['revision']}: prompts of {prompts}, scored as "
            f"{self.eval_protocol.scoring_protocol}; {scores['n']} questions asked, "
            f"{scores['skipped']} not "
            "(skipped.jsonl)"
        ]
        differs = protocol_limits(self.task, prompts).reference_difference
        lines += [f"not as the reference: {differs}"] if differs else []
        return lines + report_equal_ids([record.id for record in self.records])

    def _write_submission(self, folder: Path, items: list[AnsweredItem]) -> list[str]:
        """Write the file that the benchmark's server takes, as the answers are withheld here.

        MMMU: `{id: letter or text}`; CMMMU: a line per question with its response.
        """
        if self.task == "mmmu":
            # a letter does not need the truth to be read; an open answer is read by the server
            blank = [replace(item, answer="") for item in items]
            scored = score_items(self.task, self.eval_protocol.scoring_protocol, blank)
            told: dict[str | int, Any] = {}
            for one in scored:  # of equal ids the first counts
                letter = one.prediction if one.item.type == "multiple-choice" else None
                told.setdefault(one.item.id, letter or one.item.response)
            text = json.dumps(told, ensure_ascii=False, indent=1)
            file = folder / "submission.json"
        else:
            text = format_json_lines(
                {"id": i.id, "type": i.type, "response": i.response} for i in items
            )
            file = folder / "submission.jsonl"
        write_atomically(file, text)
        count = len({one.id for one in items}) if self.task == "mmmu" else len(items)
        several = len(items) - count
        lost = f" ({several} more have an id that another has, and are not in it)"
        return [
            f"{self.task}: the answers are withheld; {count} responses to submit in {file}"
            + (lost if several else "")
        ]


def _unfit_reason(vlm: VLM, question: BenchmarkQuestion) -> str:
    """Say why a question cannot be put to the model, "" if it can."""
    try:
        for picture in question.prompt.images:
            picture.open()
        encode_prompt(vlm, question.sample)
    except UserError as mistake:
        return str(mistake)
    return ""


def _is_withheld(items: Sequence[AnsweredItem]) -> bool:
    return any(item.answer is None for item in items)


def _items_from_lines(answer_lines: Sequence[dict[str, Any]]) -> list[AnsweredItem]:
    keys = ("id", "type", "options", "answer", "response", "subject")
    return [AnsweredItem(**{key: line[key] for key in keys}) for line in answer_lines]
