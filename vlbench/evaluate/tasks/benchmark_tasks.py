"""MMMU and CMMMU as tasks: prompts and scorer by protocol, and a file for the test server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlbench.command_line.arguments import EvalArguments, ProtocolName
from vlbench.data.sample import Sample
from vlbench.errors import UserError
from vlbench.evaluate.tasks.benchmark_files import find_split
from vlbench.evaluate.tasks.benchmark_prompts import prompt_or_skip, prompt_protocol
from vlbench.evaluate.tasks.benchmark_records import RECORD_READERS
from vlbench.evaluate.tasks.benchmark_types import (
    MMMU_CHOICE_TYPE,
    AnsweredItem,
    BenchmarkPrompt,
    BenchmarkRecord,
    GenerationLimits,
    RecordImage,
    ScoredItem,
    SkippedRecord,
    subject_or_category,
)
from vlbench.evaluate.tasks.score_report import (
    format_published,
    format_score_table,
    number_equal_ids,
    report_equal_ids,
    summarize_scores,
    write_score_files,
)
from vlbench.evaluate.tasks.scoring_protocols import (
    DEFAULT_SEED,
    score_items,
    scoring_protocol,
    unscorable_reason,
)
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.text_files import format_json, format_json_lines, write_atomically

HUB_DATASETS = {"mmmu": "MMMU/MMMU", "cmmmu": "m-a-p/CMMMU"}


@dataclass(frozen=True)
class EvalProtocol:
    """The protocol of the prompts, by task, and that of the scorer."""

    prompt_protocols: dict[str, str]
    scoring_protocol: str
    test_prompt_protocols: dict[str, str] = field(default_factory=dict)
    """Those of the split `test`, of tasks that ask it otherwise."""


YI_PROMPTS = {"mmmu": "yi", "cmmmu": "yi"}
EVAL_PROTOCOLS: dict[ProtocolName, EvalProtocol] = {
    "yi": EvalProtocol(YI_PROMPTS, "yi"),
    # the benchmark CMMMU has a scorer and no prompts: those of Yi are used
    "official": EvalProtocol({"mmmu": "official", "cmmmu": "yi"}, "official"),
    "lmms": EvalProtocol({"mmmu": "lmms", "cmmmu": "lmms"}, "lmms", {"mmmu": "lmms_test"}),
    "strict": EvalProtocol(YI_PROMPTS, "strict"),
    "raw": EvalProtocol(YI_PROMPTS, "raw"),
}


@dataclass(frozen=True)
class BenchmarkQuestion:
    """A record, and what the model is asked about it."""

    record: BenchmarkRecord
    prompt: BenchmarkPrompt
    name: str
    """The record's id, with a number where an earlier record of the task has the same."""

    @property
    def sample(self) -> Sample:
        """The conversation that ends with the question."""
        return Sample(self.record.id, (self.prompt.user_turn,), self.prompt.images)

    @property
    def answer_line(self) -> dict[str, Any]:
        """The line of answers.jsonl, without the response."""
        record = self.record
        shown = [image for image in self.prompt.images if isinstance(image, RecordImage)]
        return {
            "id": record.id,
            "name": self.name,
            "type": record.type,
            "subject": subject_or_category(record.task, record.subject, record.category),
            "options": list(record.options),
            "answer": record.json_answer,
            "picture": shown[0].digest if shown else "",
        }


class BenchmarkTask:
    """`task=mmmu` or `task=cmmmu` on a split, by a protocol."""

    def __init__(self, task: str, arguments: EvalArguments) -> None:
        """Read the records that the arguments of `eval` ask for."""
        name = arguments.protocol or "yi"
        self.task, self.protocol_name = task, name
        source, split = arguments.data or HUB_DATASETS[task], arguments.split or "val"
        protocol = EVAL_PROTOCOLS[name]
        test_prompts = protocol.test_prompt_protocols.get(task) if split == "test" else None
        self.prompt_protocol_name = test_prompts or protocol.prompt_protocols[task]
        self.scoring_protocol_name = protocol.scoring_protocol
        self.seed = DEFAULT_SEED if arguments.seed is None else arguments.seed
        subjects = arguments.subjects.strip("[]").split(",") if arguments.subjects else None
        records = RECORD_READERS[task](source, split, subjects)
        # before any is left out: one model may not be asked the first of two with one id
        numbered = number_equal_ids(record.id for record in records)
        named = list(zip(numbered, records, strict=True))
        limit = arguments.limit or len(named)
        if limit < len(named):  # spread over the data, which come subject by subject
            named = [named[index * len(named) // limit] for index in range(limit)]
        self.named_records, self.question_count = named, len(named)
        self.folder_name = f"{task}-{split}-{name}"
        self.task_settings = {
            "task": task,
            "split": split,
            "revision": find_split(source, split).data_revision(),
            "subjects": subjects,
            "questions": len(named),
            "protocol": name,
            **({"prompts": test_prompts} if test_prompts else {}),
        }

    def select_questions(
        self, vlm: LoadedVLM
    ) -> tuple[list[BenchmarkQuestion], list[dict[str, str]]]:
        """Return the questions that are asked, and those that are not, with the reason.

        The protocol skips it or cannot score it, an image cannot be read, or the text is too long.
        """
        questions: list[BenchmarkQuestion] = []
        skipped = []
        for name, record in self.named_records:
            prompt = prompt_or_skip(record, self.prompt_protocol_name)
            if isinstance(prompt, SkippedRecord):
                skipped.append({"id": record.id, "reason": prompt.reason})
                continue
            question = BenchmarkQuestion(record, prompt, name)
            reason = self._unscorable_reason(question) or _unfit_reason(vlm, question)
            if reason:
                skipped.append({"id": record.id, "reason": reason})
            else:
                questions.append(question)
        return questions, skipped

    def _unscorable_reason(self, question: BenchmarkQuestion) -> str:
        [item] = _items_from_lines([{**question.answer_line, "response": ""}])
        return unscorable_reason(self.task, self.scoring_protocol_name, item)

    def generation_limits(
        self, vlm: LoadedVLM, questions: Sequence[BenchmarkQuestion]
    ) -> GenerationLimits:
        """Return how the protocol lets a model answer."""
        return prompt_protocol(self.task, self.prompt_protocol_name).generation_limits

    def count_correct(self, answer_lines: Sequence[dict[str, Any]]) -> int | None:
        """Count right answers; None where the true ones are withheld."""
        items = _items_from_lines(answer_lines)
        if _is_withheld(items):
            return None
        return sum(scored.correct for scored in self._score_items(items))

    def _score_items(
        self, items: Sequence[AnsweredItem], seed: int = DEFAULT_SEED
    ) -> list[ScoredItem]:
        return score_items(self.task, self.scoring_protocol_name, items, seed)

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
        scored = self._score_items(items, self.seed)
        scores: dict[str, Any] = {
            "task": self.task,
            "protocol": self.protocol_name,
            "seed": self.seed,
            **self.task_settings,
            "skipped": skipped_count,
            **summarize_scores(self.task, scored),
        }
        report = [*self._report_heading(scores), ""]
        if blank_lines:
            blank_scored = self._score_items(_items_from_lines(blank_lines), self.seed)
            scores["blank"] = summarize_scores(self.task, blank_scored)
            report += [f"with blank images: {scores['blank']['accuracy']:.3f}", ""]
        write_score_files(folder, scores, answer_lines, scored)
        accuracy_format = scoring_protocol(self.task, self.scoring_protocol_name).accuracy_format
        table = format_score_table(scores, accuracy_format)
        return [*report, *table, "", *format_published(scores)]

    def _report_heading(self, scores: dict[str, Any]) -> list[str]:
        """Return lines on the data, the protocols, and how many questions were skipped."""
        lines = [
            f"{self.task} {scores['split']}, {scores['revision']}: prompts of "
            f"{self.prompt_protocol_name}, scored as {self.scoring_protocol_name}; "
            f"{scores['n']} questions asked, {scores['skipped']} not (skipped.jsonl)"
        ]
        limits = prompt_protocol(self.task, self.prompt_protocol_name).generation_limits
        if limits.reference_difference:
            lines.append(f"not as the reference: {limits.reference_difference}")
        return lines + report_equal_ids([record.id for _, record in self.named_records])

    def _write_submission(self, folder: Path, items: list[AnsweredItem]) -> list[str]:
        """Write the file that the benchmark's server accepts, as the answers are withheld here.

        MMMU: `{id: letter or text}`; CMMMU: a line per question with its response.
        """
        if self.task == "mmmu":
            # a letter is parsed without the true answer; an open answer is parsed by the server
            submission: dict[str | int, Any] = {}
            for scored in self._score_items([replace(item, answer="") for item in items]):
                letter = scored.prediction if scored.item.type == MMMU_CHOICE_TYPE else None
                # of equal ids the first counts
                submission.setdefault(scored.item.id, letter or scored.item.response)
            text = format_json(submission, indent=1)
            file = folder / "submission.json"
        else:
            text = format_json_lines(
                {"id": i.id, "type": i.type, "response": i.response} for i in items
            )
            file = folder / "submission.jsonl"
        write_atomically(file, text)
        count = len({item.id for item in items}) if self.task == "mmmu" else len(items)
        report = f"{self.task}: the answers are withheld; {count} responses to submit in {file}"
        if duplicates := len(items) - count:
            report += f" ({duplicates} more have an id that another has, and are not in it)"
        return [report]


def _unfit_reason(vlm: LoadedVLM, question: BenchmarkQuestion) -> str:
    """Return why a question cannot be asked, "" if it can."""
    try:
        for image in question.prompt.images:
            image.open()
        vlm.processor.encode_prompt(question.sample)
    except UserError as error:
        return str(error)
    return ""


def _is_withheld(items: Sequence[AnsweredItem]) -> bool:
    return any(item.answer is None for item in items)


def _items_from_lines(answer_lines: Sequence[dict[str, Any]]) -> list[AnsweredItem]:
    keys = ("id", "type", "options", "answer", "response", "subject")
    return [AnsweredItem(**{key: line[key] for key in keys}) for line in answer_lines]
