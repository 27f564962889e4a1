"""Files of answers as items to be scored; what is wrong with a record is said of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from vlbench.errors import UserError, suggest_name
from vlbench.evaluate.tasks.answer_formats import AnswerRecord, read_answer_records
from vlbench.evaluate.tasks.cmmmu_answers import FALSE_ANSWER, OPTION_LETTERS, TRUE_ANSWER
from vlbench.evaluate.tasks.scored_items import AnsweredItem, option_letters
from vlbench.evaluate.tasks.scoring_protocols import SCORING_PROTOCOLS
from vlbench.evaluate.tasks.subject_domains import known_subject_of_id

TruthsById = Mapping[str, AnswerRecord]

REQUIRED_KEYS = ("id", "type", "answer", "response")
MAX_OPTIONS = {
    "multiple-choice": 26,
    "选择": len(OPTION_LETTERS),
}  # types with options, and how many at most
WITHHELD_ANSWERS: tuple[object, ...] = (None, "", "?", [])
DATA_HINT = (
    "say data=FOLDER of the benchmark, or for protocol=yi data=answer_dict_val.json of MMMU's code"
)
MAX_SHOWN_ERRORS = 20  # lines that are said of a file in which more is wrong


def read_answers(
    task: str, path: Path, truths: TruthsById | None = None, needs_options: bool = True
) -> tuple[list[AnswerRecord], list[AnsweredItem], list[str]]:
    """Return the records of a file, the items that are in them, and what is wrong with others.

    A record has `id`, `type`, `answer`, `response`, where there are letters `options` (unless they
    are not needed), and may have `subject`; other keys are kept. What is missing is taken from
    `truths`, by id. An id is a label that several may have, but a question with options that is
    there twice, answer and all, counts once. Raises a Mistake for a file without any such record.
    """
    records: list[AnswerRecord] = []
    wrong: list[str] = []
    known: dict[str, str] = {}
    found = read_answer_records(path)
    if truths is None and found and all(_lacks_question(one) for _, one in found):
        raise UserError(f"{path}: holds answers without their questions; {DATA_HINT}")
    for where, record in found:
        record = _complete_record(record, truths)
        reason = record if isinstance(record, str) else _record_error(task, record, needs_options)
        if not reason and isinstance(record, dict):
            before = known.setdefault(json.dumps(record, sort_keys=True), where)
            if before == where or not record.get("options"):  # many questions are answered "yes"
                records.append(record)
                continue
            number = before.removeprefix(f"{path}: ")
            reason = f" ({record['id']}): {number} has this id as well, and is the same in all"
        wrong.append(f"{where}{reason}")
    if not records:
        raise UserError(
            "\n".join(first_errors(wrong))
            or f"{path}: holds no answers; it must have one JSON object a line, or an array"
        )
    return records, [_item_from_record(task, record) for record in records], wrong


def _lacks_question(record: AnswerRecord | str) -> bool:
    """Tell whether a record says neither what kind of question it answers nor what is right."""
    return isinstance(record, dict) and not {"type", "answer"} & record.keys()


def _complete_record(record: AnswerRecord | str, truths: TruthsById | None) -> AnswerRecord | str:
    """Return a record with what it lacks of its question, as CMMMU's and MMMU's servers add it.

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
    """Return the first SHOWN of the lines that say what is wrong, and how many more there are."""
    more = (
        [f"{len(errors) - MAX_SHOWN_ERRORS} more mistakes"]
        if len(errors) > MAX_SHOWN_ERRORS
        else []
    )
    return errors[:MAX_SHOWN_ERRORS] + more


def _record_error(task: str, record: AnswerRecord, needs_options: bool) -> str:
    """Return what is wrong with a record, "" if nothing is."""
    missing = [key for key in REQUIRED_KEYS if key not in record]
    if missing:
        return f" has no {' and no '.join(missing)}"
    identity, kind, answer = record["id"], record["type"], record["answer"]
    if not isinstance(identity, str | int) or not isinstance(record.get("subject") or "", str):
        return ": id must be text or a whole number, and subject text"
    known = SCORING_PROTOCOLS[task]["official"].rules
    if not isinstance(kind, str) or kind not in known:
        allowed = ", ".join(known)
        return (
            f" ({identity}): type is '{kind}'; {task} has "
            f"{allowed}.{suggest_name(str(kind), known)}"
        )
    if answer in WITHHELD_ANSWERS:
        return (
            f" ({identity}): the answer is withheld, so there is nothing to score against; "
            "use the submission file"
        )
    reason = _answer_error(task, kind, answer)
    if not reason and (needs_options or record.get("options")):
        reason = _options_error(record)
    return f" ({identity}): {reason}" if reason else ""


def _answer_error(task: str, question_type: str, answer: object) -> str:
    several = answer if isinstance(answer, list) and task == "mmmu" else [answer]
    if not all(isinstance(one, str) for one in several):
        allowed = "text, or a list of texts" if task == "mmmu" else "text"
        return f"answer is {json.dumps(answer, ensure_ascii=False):.60}; it must be {allowed}"
    if question_type == "判断" and answer not in (TRUE_ANSWER, FALSE_ANSWER):
        return f"answer is '{answer}'; it must be {TRUE_ANSWER} or {FALSE_ANSWER}"
    return ""


def _options_error(record: AnswerRecord) -> str:
    """Return what is wrong with the options of a record, and with an answer that is none of them.

    An option may be null or empty: the benchmarks' own code stops at it, or not.
    """
    most, options = MAX_OPTIONS.get(record["type"]), record.get("options", [])
    if most is None:
        return ""
    if not options:
        return f"a question of type {record['type']} needs options"
    fine = isinstance(options, list) and all(isinstance(one, str | None) for one in options)
    if not fine or len(options) > most:
        return f"options must be a list of at most {most} texts"
    there, answer = option_letters(options), record["answer"]
    for one in answer if isinstance(answer, list) else [answer]:
        named = one.strip().upper()  # "b" and "B " are let through, and never right, as there
        if not set(named) <= set(there) or (len(named) > 1 and record["type"] != "选择"):
            return f"the answer is '{one}', but the options are {there[0]} to {there[-1]}"
    return ""


def _item_from_record(task: str, record: AnswerRecord) -> AnsweredItem:
    """Return a record as an item; the values that MMMU's code has read already are a tuple."""
    response = record["response"]
    return AnsweredItem(
        record["id"],
        record["type"],
        record.get("options") or [],
        record["answer"],
        tuple(response) if isinstance(response, list) and "parsed_pred" in record else response,
        record.get("subject") or known_subject_of_id(task, str(record["id"])),
    )
