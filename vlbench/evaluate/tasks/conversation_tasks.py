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
from vlbench.command_line.task_words import FILE_TASK
from vlbench.config import recipe as recipes
from vlbench.data.conversation_files import ConversationFiles
from vlbench.data.conversation_record import ROLE_ALIASES
from vlbench.data.sample import Sample
from vlbench.data.shuffle import pick_fixed_subset
from vlbench.errors import BadSample, UserError
from vlbench.evaluate.answer_metrics import is_exact_match, text_overlap, vqa_accuracy
from vlbench.evaluate.batch_inference import max_answer_tokens
from vlbench.evaluate.heldout_questions import (
    EvalQuestion,
    LeftOutRecord,
    QuestionReader,
    describe_left_out,
    final_questions,
    make_ids_unique,
)
from vlbench.evaluate.known_pictures import KnownPictures
from vlbench.evaluate.tasks.benchmark_types import GenerationLimits
from vlbench.evaluate.tasks.score_report import wilson_interval
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.text_files import format_json, format_json_lines, write_atomically
from vlbench.train import checkpoint_files
from vlbench.train.resume import find_released_model

AnswerLine = dict[str, Any]
HumanAnswers = dict[tuple[str, int], tuple[str, ...]]
"""Answers by record number and turn."""


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
        """The line of answers.jsonl, without the response."""
        return {
            "id": self.question.sample.id,
            "record": self.question.record_number,
            "set": self.set_name,
            "type": self.question.type,
            "language": self.question.language,
            "picture": self.question.picture,
            "answer": list(self.true_answers),
        }


def _load_questions(
    task: str, arguments: EvalArguments, pictures: KnownPictures
) -> tuple[list[ConversationQuestion], list[LeftOutRecord]]:
    """Return the questions of `own`, or of the file `data=`, and the records that are left out.

    `pictures` gets the images of the file.
    """
    human_answers: HumanAnswers = {}
    left_out: list[LeftOutRecord] = []
    if task == FILE_TASK:
        if arguments.data is None:
            raise UserError(f"task={FILE_TASK} needs data=FILE.json")
        source = QuestionFile(arguments.data, arguments.images, arguments.allow_outside)
        human_answers = _collect_human_answers(source)
        reader = QuestionReader(source, pictures)
        questions, left_out = reader.read_until(100 * len(source)), reader.left_out
        sets = {source.name: make_ids_unique(questions)}
    else:
        run = Path(arguments.model)
        if not checkpoint_files.is_run_or_checkpoint(run):
            find_released_model(arguments.model, "model")
            raise UserError(f"{run} is no run: eval needs data=FILE.json (images=FOLDER)")
        recipe = recipes.load_recipe_file(checkpoint_files.find_checkpoint(run) / "recipe.yaml")
        name, questions, unseen = final_questions(recipe.last_stage_data, recipe.log.questions)
        sets = {name: questions, "unseen pairs": unseen}
    first_set = next(iter(sets))
    if not sets[first_set]:
        reason = f" ({describe_left_out(left_out)})" if left_out else ""
        raise UserError(
            f"{first_set} holds no sample with an image that could be asked about{reason}"
        )
    return [
        ConversationQuestion(question, name, _true_answers(question, human_answers))
        for name, questions in sets.items()
        for question in questions
    ], left_out


def _true_answers(question: EvalQuestion, human_answers: HumanAnswers) -> tuple[str, ...]:
    turn = len(question.sample.turns)
    return human_answers.get((question.record_number, turn), (question.answer,))


def _checksum(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


class QuestionFile(ConversationFiles):
    """Conversations, of which some end in a question that several people have answered.

    Their most frequent answer is added as the turn that the question lacks.
    """

    def read_record(self, index: int, with_images: bool = False) -> Any:
        """Return record `index` (from 0) with the turn that is added to it, or raise BadSample."""
        record = super().read_record(index, with_images)
        texts = _read_answers(record)
        turns: Any = record.get("conversations") if texts else None
        last = turns[-1] if isinstance(turns, list) and turns else None
        if not isinstance(last, dict) or ROLE_ALIASES.get(str(last.get("from"))) != "human":
            return record
        answer = {"from": "gpt", "value": Counter(texts).most_common(1)[0][0]}
        return {**record, "conversations": [*turns, answer]}


def _read_answers(record: Any) -> list[str]:
    """Return the `answers` of a record, [] where it has none or something else than texts.

    VQAv2 gives ten, as texts or as `{"answer": text}`.
    """
    answers = record.get("answers") if isinstance(record, dict) else None
    entries = answers if isinstance(answers, list) else []
    values = [entry.get("answer") if isinstance(entry, dict) else entry for entry in entries]
    texts = [value for value in values if isinstance(value, str) and value.strip()]
    return texts if len(texts) == len(values) else []


def _collect_human_answers(source: QuestionFile) -> HumanAnswers:
    """Return what several people answered to the last questions of those records that have it."""
    human_answers = {}
    for index in range(len(source)):
        try:
            record = source.read_record(index)
            if not isinstance(record, dict) or record.get("answers") is None:
                continue  # null where only other rows of a Parquet file have it
            texts = _read_answers(record)
            if not texts:
                name = record.get("id", f"record {index + 1}")
                raise UserError(f"{source.name}: {name}: 'answers' must be a list of texts")
            sample = source[index]
        except BadSample:
            continue  # collect_questions counts and names it
        human_answers[str(index + 1), len(sample.turns) - 1] = tuple(texts)
    return human_answers


class ConversationTask:
    """`task=own`, the questions of a run, or `task=llava_json data=FILE.json images=FOLDER`."""

    def __init__(self, task: str, arguments: EvalArguments) -> None:
        """Read the questions that the arguments of `eval` ask for."""
        pictures = KnownPictures()
        questions, self.left_out_records = _load_questions(task, arguments, pictures)
        self.all_questions = pick_fixed_subset(questions, arguments.limit)
        self.question_count = len(self.all_questions)
        self.folder_name = f"{task}-{Path(arguments.data).stem}" if arguments.data else task
        texts = [
            (one.sample.id, one.question.question_text, one.true_answers) for one in questions
        ]  # of all: the same data under another limit are asked a part of the same questions
        self.task_settings = {
            "task": task,
            "questions": dict(Counter(question.set_name for question in self.all_questions)),
            "revision": _checksum(texts),
        }
        if task == FILE_TASK:  # the same texts may be asked about other images=
            shown = [[pictures.digest(image) for image in one.sample.images] for one in questions]
            self.task_settings["pictures"] = _checksum(shown)

    def select_questions(
        self, vlm: LoadedVLM
    ) -> tuple[list[ConversationQuestion], list[dict[str, str]]]:
        """Return what can be asked, sorted by length against padding, and what cannot.

        The latter are records without an image, bad samples, and questions that the processor
        cannot encode, such as texts that are too long for the language model.
        """
        prompt_lengths: dict[int, int] = {}
        skipped = [
            {**vars(left_out), "record": str(left_out.record)} for left_out in self.left_out_records
        ]
        for index, question in enumerate(self.all_questions):
            try:
                prompt_lengths[index] = len(vlm.processor.encode_prompt(question.sample))
            except UserError as error:
                record = question.question.record_number
                skipped.append({"id": question.sample.id, "record": record, "reason": str(error)})
        order = sorted(prompt_lengths, key=prompt_lengths.__getitem__)
        return [self.all_questions[index] for index in order], skipped

    def generation_limits(
        self, vlm: LoadedVLM, questions: Sequence[ConversationQuestion]
    ) -> GenerationLimits:
        """Return how long an answer may be: a little more than the longest right one."""
        answers = [answer for question in questions for answer in question.true_answers]
        return GenerationLimits(max_answer_tokens(vlm, answers))

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
        judged_lines = [_judge_line(line) for line in answer_lines]
        sets = _summarize_sets(judged_lines)
        scores = {**self.task_settings, "skipped": skipped_count, "sets": sets}
        report = format_set_table(sets)
        report += self._describe_skipped(skipped_count)
        if blank_lines:
            blank_sets = scores["blank"] = _summarize_sets([_judge_line(x) for x in blank_lines])
            shares = (f"{name} {scored['accuracy']:.3f}" for name, scored in blank_sets.items())
            report.append(f"with blank images: {', '.join(shares)}")
        write_atomically(folder / "scored.jsonl", format_json_lines(judged_lines))
        write_atomically(folder / "scores.json", format_json(scores, indent=1) + "\n")
        return report

    def _describe_skipped(self, skipped_count: int) -> list[str]:
        """Return how many records and questions were not asked, and the first of each kind."""
        unfit = skipped_count - len(self.left_out_records)
        parts = [describe_left_out(self.left_out_records)] if self.left_out_records else []
        parts += [f"{unfit} questions that the model cannot be asked"] if unfit else []
        return [f"not asked: {'; '.join(parts)} (skipped.jsonl)"] if parts else []


def _summarize_sets(judged_lines: Sequence[AnswerLine]) -> dict[str, Any]:
    names = dict.fromkeys(line["set"] for line in judged_lines)
    return {
        name: summarize_set([line for line in judged_lines if line["set"] == name])
        for name in names
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
    """Return the scores of one set in scores.json, by type and language where they are known."""
    return {
        **_accuracy_of_lines(judged_lines),
        **text_overlap(
            [line["response"] for line in judged_lines], [line["answer"] for line in judged_lines]
        ),
        "by_type": _accuracy_by_group(judged_lines, lambda line: str(line["type"])),
        "by_language": _accuracy_by_group(judged_lines, lambda line: str(line["language"])),
    }


def _accuracy_by_group(
    judged_lines: Sequence[AnswerLine], group_of: Callable[[AnswerLine], str]
) -> dict[str, Any]:
    names = sorted({group_of(line) for line in judged_lines} - {""})
    return {
        name: _accuracy_of_lines([line for line in judged_lines if group_of(line) == name])
        for name in names
    }


def _accuracy_of_lines(judged_lines: Sequence[AnswerLine]) -> dict[str, Any]:
    n, correct = len(judged_lines), sum(line["correct"] for line in judged_lines)
    return {
        "n": n,
        "correct": correct,
        "accuracy": correct / n,
        "interval": [round(bound, 4) for bound in wilson_interval(correct, n)],
        "vqa_accuracy": round(sum(line["vqa"] for line in judged_lines) / n, 6),
    }


def format_set_table(set_scores: dict[str, Any]) -> list[str]:
    """Return lines on every set, its types and its languages."""
    lines = []
    for name, scored in set_scores.items():
        low, high = scored["interval"]
        lines += [
            f"{name}: {scored['accuracy']:.3f} of {scored['n']} questions right, word for word "
            f"(95 % {low:.3f} to {high:.3f})",
            f"  VQA accuracy {scored['vqa_accuracy']:.3f}, F1 of words {scored['f1']:.1f}, chrF "
            f"{scored['chrf']:.1f}",
        ]
        for kind in ("type", "language"):
            groups = scored[f"by_{kind}"]
            if groups:
                shares = ", ".join(f"{key} {part['accuracy']:.3f}" for key, part in groups.items())
                lines.append(f"  by {kind}: {shares}")
    return lines
