"""Files of answers as items to be scored: validated, and completed from the benchmark's questions.

What is wrong with a record is one line of text about it. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlbench.errors import UserError
from vlbench.evaluate.tasks.answer_formats import AnswerRecord, read_answer_records
from vlbench.evaluate.tasks.answer_parsing import CMMMU_LETTERS, FALSE_ANSWER, TRUE_ANSWER
from vlbench.evaluate.tasks.benchmark_records import RECORD_READERS
from vlbench.evaluate.tasks.benchmark_types import (
    CMMMU_CHOICE_TYPE,
    CMMMU_JUDGEMENT_TYPE,
    MMMU_CHOICE_TYPE,
    UNKNOWN_SUBJECT,
    AnsweredItem,
    known_subject_of_id,
    option_letters,
    subject_or_category,
)
from vlbench.evaluate.tasks.scoring_protocols import SCORING_PROTOCOLS, unknown_type_error

TruthsById = Mapping[str, AnswerRecord]

REQUIRED_KEYS = ("id", "type", "answer", "response")
TRUTH_KEYS = ("type", "options", "answer", "subject")
MAX_OPTIONS = {MMMU_CHOICE_TYPE: 26, CMMMU_CHOICE_TYPE: len(CMMMU_LETTERS)}
"""The types with options, and how many they have at most."""
WITHHELD_ANSWERS: tuple[object, ...] = (None, "", "?", [])
DATA_HINT = (
    "say data=FOLDER of the benchmark, or for protocol=yi data=answer_dict_val.json of MMMU's code"
)
MAX_SHOWN_ERRORS = 20  # lines that are printed of a file with more errors


def read_answers(
    task: str, path: Path, truths: TruthsById | None = None, needs_options: bool = True
) -> tuple[list[AnswerRecord], list[AnsweredItem], list[str]]:
    """Return the records of a file, their items, and what is wrong with all other records.

    A record has `id`, `type`, `answer`, `response`, for types with letters `options` (unless they
    are not needed), and may have `subject`; other keys are kept. What is missing is taken from
    `truths`, by id. Several questions may have the same id, but a question with options that
    occurs twice, answer and all, counts once. Raises a UserError for a file without any valid
    record.
    """
    records: list[AnswerRecord] = []
    errors: list[str] = []
    first_locations: dict[str, str] = {}
    located_records = read_answer_records(path)
    if truths is None and located_records and all(_lacks_question(r) for _, r in located_records):
        raise UserError(f"{path}: holds answers without their questions; {DATA_HINT}")
    for location, record in located_records:
        record = _complete_record(record, truths)
        error = record if isinstance(record, str) else _record_error(task, record, needs_options)
        if not error and isinstance(record, dict):
            text = json.dumps(record, sort_keys=True)
            first = first_locations.setdefault(text, location)
            if first == location or not record.get("options"):  # many questions have answer "yes"
                records.append(record)
                continue
            line = first.removeprefix(f"{path}: ")
            error = f" ({record['id']}): {line} has this id as well, and is the same in all"
        errors.append(f"{location}{error}")
    if not records:
        raise UserError(
            *(
                first_errors(errors)
                or [f"{path}: holds no answers; it must have one JSON object a line, or an array"]
            )
        )
    return records, [_item_from_record(task, record) for record in records], errors


def _lacks_question(record: AnswerRecord | str) -> bool:
    """Return whether a record has neither the type of its question nor the right answer."""
    return isinstance(record, dict) and not {"type", "answer"} & record.keys()


def _complete_record(record: AnswerRecord | str, truths: TruthsById | None) -> AnswerRecord | str:
    """Return a record with the missing keys of its question, as the benchmarks' servers add them.

    Without a `response` its `answer` is the one that is to be judged.
    """
    if isinstance(record, str) or truths is None:
        return record
    if "response" not in record and "answer" in record:
        record = {**record, "response": record["answer"]}
        del record["answer"]
    truth = truths.get(str(record.get("id")))
    if truth is None and not set(REQUIRED_KEYS) <= record.keys():
        return f" ({record.get('id')}): data= has no question of this id"
    return {**(truth or {}), **record}


def first_errors(errors: list[str]) -> list[str]:
    """Return the first MAX_SHOWN_ERRORS lines, and how many more there are."""
    more = len(errors) - MAX_SHOWN_ERRORS
    return errors[:MAX_SHOWN_ERRORS] + ([f"{more} more mistakes"] if more > 0 else [])


def _record_error(task: str, record: AnswerRecord, needs_options: bool) -> str:
    """Return what is wrong with a record, "" if nothing is."""
    missing = [key for key in REQUIRED_KEYS if key not in record]
    if missing:
        return f" has no {' and no '.join(missing)}"
    record_id, question_type, answer = record["id"], record["type"], record["answer"]
    if not isinstance(record_id, str | int) or not isinstance(record.get("subject") or "", str):
        return ": id must be text or a whole number, and subject text"
    official = SCORING_PROTOCOLS[task]["official"]
    if type_error := unknown_type_error(task, question_type, official):
        return f" ({record_id}): {type_error}"
    if answer in WITHHELD_ANSWERS:
        return (
            f" ({record_id}): the answer is withheld, so there is nothing to score against; "
            "use the submission file"
        )
    error = _answer_error(task, question_type, answer)
    if not error and (needs_options or record.get("options")):
        error = _options_error(record)
    return f" ({record_id}): {error}" if error else ""


def _answer_error(task: str, question_type: str, answer: object) -> str:
    answers = answer if isinstance(answer, list) and task == "mmmu" else [answer]
    if not all(isinstance(one, str) for one in answers):
        allowed = "text, or a list of texts" if task == "mmmu" else "text"
        return f"answer is {json.dumps(answer, ensure_ascii=False):.60}; it must be {allowed}"
    if question_type == CMMMU_JUDGEMENT_TYPE and answer not in (TRUE_ANSWER, FALSE_ANSWER):
        return f"answer is '{answer}'; it must be {TRUE_ANSWER} or {FALSE_ANSWER}"
    return ""


def _options_error(record: AnswerRecord) -> str:
    """Return what is wrong with the options of a record, or with an answer that is none of them.

    An option may be null or empty: some of the benchmarks' own scorers accept it.
    """
    most, options = MAX_OPTIONS.get(record["type"]), record.get("options", [])
    if most is None:
        return ""
    if not options:
        return f"a question of type {record['type']} needs options"
    is_valid = isinstance(options, list) and all(isinstance(one, str | None) for one in options)
    if not is_valid or len(options) > most:
        return f"options must be a list of at most {most} texts"
    known, answers = option_letters(options), record["answer"]
    for answer in answers if isinstance(answers, list) else [answers]:
        letters = answer.strip().upper()  # "b" and "B " pass, and are never right, as there
        takes_several = record["type"] == CMMMU_CHOICE_TYPE
        if not set(letters) <= set(known) or (len(letters) > 1 and not takes_several):
            return f"the answer is '{answer}', but the options are {known[0]} to {known[-1]}"
    return ""


def _item_from_record(task: str, record: AnswerRecord) -> AnsweredItem:
    """Return a record as an item; values that MMMU's own code has parsed already are a tuple."""
    response = record["response"]
    is_parsed = isinstance(response, list) and "parsed_pred" in record
    return AnsweredItem(
        id=record["id"],
        type=record["type"],
        options=record.get("options") or [],
        answer=record["answer"],
        response=tuple(response) if is_parsed else response,
        subject=record.get("subject") or _subject_of(task, record),
    )


def _subject_of(task: str, record: AnswerRecord) -> str:
    """Return the subject that a record's id names, or CMMMU's keys for it."""
    subject = known_subject_of_id(task, str(record["id"]))
    if subject != UNKNOWN_SUBJECT:
        return subject
    named = (str(record.get(key) or "") for key in ("subcategory", "category"))
    return subject_or_category(task, *named) or UNKNOWN_SUBJECT


def describe_unanswered(records: Sequence[AnswerRecord], truths: TruthsById) -> str:
    """Return how many questions of data= have no answer in a file, "" for none."""
    answered = {str(record["id"]) for record in records}
    missing = [one for one in truths if one not in answered]
    if not missing:
        return ""
    return (
        f"{len(missing):,} of the {len(truths):,} questions of data= have no answer here "
        f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}), and the scores are "
        "without them"
    )


def read_truths(task: str, data: str, split: str) -> dict[str, AnswerRecord]:
    """Return types, options, answers and subjects of questions, by id.

    `data` is MMMU's answer_dict_val.json, any file of answers that also has the right ones, or a
    folder or hub id of the benchmark, of which `split` is read. Raises a UserError when two
    different questions have one id.
    """
    file = Path(data).expanduser()
    if file.is_file() and file.suffix in (".json", ".jsonl"):
        questions = [one for _, one in read_answer_records(file) if isinstance(one, dict)]
    else:
        questions = [
            {
                "id": record.id,
                "type": record.type,
                "options": list(record.options),
                "answer": record.json_answer,
                "subject": subject_or_category(task, record.subject, record.category),
            }
            for record in RECORD_READERS[task](data, split, None)
        ]
    truths: dict[str, AnswerRecord] = {}
    for question in questions:
        record_id = str(question.get("id"))
        truth = {key: question[key] for key in TRUTH_KEYS if key in question}
        if truths.setdefault(record_id, truth) != truth:
            raise UserError(
                f"data={data} has several questions of the id {record_id}: whose answer is it?"
            )
    if not any("answer" in truth for truth in truths.values()):
        raise UserError(f"data={data} has no questions with id, type and answer")
    return truths
