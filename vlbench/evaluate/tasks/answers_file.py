"""Files of answers as items to be scored; what is wrong with a record is said of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from vlbench.evaluate.tasks.answer_shapes import Record, read_shapes
from vlbench.evaluate.tasks.cmmmu_answers import LETTERS, RIGHT, WRONG
from vlbench.evaluate.tasks.items import Item, letters
from vlbench.evaluate.tasks.protocols import PROTOCOLS
from vlbench.evaluate.tasks.subjects import subject_in
from vlbench.mistakes import Mistake, nearest

Truths = Mapping[str, Record]

NEEDED = ("id", "type", "answer", "response")
CHOICES = {"multiple-choice": 26, "选择": len(LETTERS)}  # types with options, and how many at most
WITHHELD: tuple[object, ...] = (None, "", "?", [])
DATA = (
    "say data=FOLDER of the benchmark, or for protocol=yi data=answer_dict_val.json of MMMU's code"
)
SHOWN = 20  # lines that are said of a file in which more is wrong


def read_answers(
    task: str, path: Path, truths: Truths | None = None, options_needed: bool = True
) -> tuple[list[Record], list[Item], list[str]]:
    """Return the records of a file, the items that are in them, and what is wrong with others.

    A record has `id`, `type`, `answer`, `response`, where there are letters `options` (unless they
    are not needed), and may have `subject`; other keys are kept. What is missing is taken from
    `truths`, by id. An id is a label that several may have, but a question with options that is
    there twice, answer and all, counts once. Raises a Mistake for a file without any such record.
    """
    records: list[Record] = []
    wrong: list[str] = []
    known: dict[str, str] = {}
    found = read_shapes(path)
    if truths is None and found and all(_bare(one) for _, one in found):
        raise Mistake(f"{path}: holds answers without their questions; {DATA}")
    for where, record in found:
        record = _completed(record, truths)
        reason = record if isinstance(record, str) else _reason(task, record, options_needed)
        if not reason and isinstance(record, dict):
            before = known.setdefault(json.dumps(record, sort_keys=True), where)
            if before == where or not record.get("options"):  # many questions are answered "yes"
                records.append(record)
                continue
            number = before.removeprefix(f"{path}: ")
            reason = f" ({record['id']}): {number} has this id as well, and is the same in all"
        wrong.append(f"{where}{reason}")
    if not records:
        raise Mistake(
            "\n".join(shown(wrong))
            or f"{path}: holds no answers; it must have one JSON object a line, or an array"
        )
    return records, [_item(task, record) for record in records], wrong


def _bare(record: Record | str) -> bool:
    """Tell whether a record says neither what kind of question it answers nor what is right."""
    return isinstance(record, dict) and not {"type", "answer"} & record.keys()


def _completed(record: Record | str, truths: Truths | None) -> Record | str:
    """Return a record with what it lacks of its question, as CMMMU's and MMMU's servers add it.

    Without a `response` its `answer` is the one that is to be judged.
    """
    if isinstance(record, str) or truths is None:
        return record
    if "response" not in record and "answer" in record:
        record = {**record, "response": record["answer"]}
        del record["answer"]
    truth = truths.get(str(record.get("id")))
    if truth is None and not set(NEEDED) <= record.keys():
        return f" ({record.get('id')}): data= has no question of this id"
    return {**(truth or {}), **record}


def shown(wrong: list[str]) -> list[str]:
    """Return the first SHOWN of the lines that say what is wrong, and how many more there are."""
    more = [f"{len(wrong) - SHOWN} more mistakes"] if len(wrong) > SHOWN else []
    return wrong[:SHOWN] + more


def _reason(task: str, record: Record, options_needed: bool) -> str:
    """Return what is wrong with a record, "" if nothing is."""
    missing = [key for key in NEEDED if key not in record]
    if missing:
        return f" has no {' and no '.join(missing)}"
    identity, kind, answer = record["id"], record["type"], record["answer"]
    if not isinstance(identity, str | int) or not isinstance(record.get("subject") or "", str):
        return ": id must be text or a whole number, and subject text"
    known = PROTOCOLS[task]["official"].rules
    if not isinstance(kind, str) or kind not in known:
        allowed = ", ".join(known)
        return f" ({identity}): type is '{kind}'; {task} has {allowed}.{nearest(str(kind), known)}"
    if answer in WITHHELD:
        return (
            f" ({identity}): the answer is withheld, so there is nothing to score against; "
            "use the submission file"
        )
    reason = _wrong_answer(task, kind, answer)
    if not reason and (options_needed or record.get("options")):
        reason = _wrong_options(record)
    return f" ({identity}): {reason}" if reason else ""


def _wrong_answer(task: str, kind: str, answer: object) -> str:
    several = answer if isinstance(answer, list) and task == "mmmu" else [answer]
    if not all(isinstance(one, str) for one in several):
        allowed = "text, or a list of texts" if task == "mmmu" else "text"
        return f"answer is {json.dumps(answer, ensure_ascii=False):.60}; it must be {allowed}"
    if kind == "判断" and answer not in (RIGHT, WRONG):
        return f"answer is '{answer}'; it must be {RIGHT} or {WRONG}"
    return ""


def _wrong_options(record: Record) -> str:
    """Return what is wrong with the options of a record, and with an answer that is none of them.

    An option may be null or empty: the benchmarks' own code stops at it, or not.
    """
    most, options = CHOICES.get(record["type"]), record.get("options", [])
    if most is None:
        return ""
    if not options:
        return f"a question of type {record['type']} needs options"
    fine = isinstance(options, list) and all(isinstance(one, str | None) for one in options)
    if not fine or len(options) > most:
        return f"options must be a list of at most {most} texts"
    there, answer = letters(options), record["answer"]
    for one in answer if isinstance(answer, list) else [answer]:
        named = one.strip().upper()  # "b" and "B " are let through, and never right, as there
        if not set(named) <= set(there) or (len(named) > 1 and record["type"] != "选择"):
            return f"the answer is '{one}', but the options are {there[0]} to {there[-1]}"
    return ""


def _item(task: str, record: Record) -> Item:
    """Return a record as an item; the values that MMMU's code has read already are a tuple."""
    response = record["response"]
    return Item(
        record["id"],
        record["type"],
        record.get("options") or [],
        record["answer"],
        tuple(response) if isinstance(response, list) and "parsed_pred" in record else response,
        record.get("subject") or subject_in(task, str(record["id"])),
    )
