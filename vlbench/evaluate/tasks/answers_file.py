"""Files of answers, one JSON object a line; what is wrong with a line is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlbench.evaluate.tasks.cmmmu_answers import LETTERS, RIGHT, WRONG
from vlbench.evaluate.tasks.items import Item, letters
from vlbench.evaluate.tasks.protocols import PROTOCOLS
from vlbench.evaluate.tasks.subjects import subject_in
from vlbench.files import read_text
from vlbench.mistakes import Mistake, nearest

Record = dict[str, Any]

NEEDED = ("id", "type", "answer", "response")
CHOICES = {"multiple-choice": 26, "选择": len(LETTERS)}  # types with options, and how many at most
WITHHELD: tuple[object, ...] = (None, "", "?", [])
SHOWN = 20  # lines that are said of a file in which more is wrong


def read_answers(task: str, path: Path) -> tuple[list[Record], list[Item], list[str]]:
    """Return the lines of the file, the items that are in them, and what is wrong with others.

    A line has `id`, `type`, `answer`, `response`, where there are letters `options`, and may have
    `subject`; other keys are kept. Raises a Mistake for a file without any such line.
    """
    records: list[Record] = []
    wrong: list[str] = []
    known: dict[str, int] = {}
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        record = _object(line)
        reason = record if isinstance(record, str) else _reason(task, record)
        if not reason and isinstance(record, dict):
            before = known.setdefault(str(record["id"]), number)
            if before == number:
                records.append(record)
                continue
            reason = f" ({record['id']}): line {before} has this id as well"
        wrong.append(f"{path}: line {number}{reason}")
    if not records:
        raise Mistake(
            "\n".join(shown(wrong))
            or f"{path}: holds no answers; it must have one JSON object a line"
        )
    return records, [_item(task, record) for record in records], wrong


def _lines(path: Path) -> list[str]:
    """Return the lines of a file; bytes that are no UTF-8 spoil their own line alone."""
    try:
        return read_text(path).split("\n")
    except Mistake:
        if not path.is_file():
            raise
        return path.read_bytes().decode("utf-8-sig", "surrogateescape").split("\n")


def shown(wrong: list[str]) -> list[str]:
    """Return the first SHOWN of the lines that say what is wrong, and how many more there are."""
    more = [f"{len(wrong) - SHOWN} more mistakes"] if len(wrong) > SHOWN else []
    return wrong[:SHOWN] + more


def _object(line: str) -> Record | str:
    """Return the JSON object in a line, or what is wrong with the line."""
    try:
        line.encode()
    except UnicodeEncodeError:
        return " is not UTF-8 text"
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return " has half of a surrogate pair in it, which is no text"
    except (ValueError, RecursionError) as error:
        return f" is not JSON ({error})"
    return record if isinstance(record, dict) else " is not a JSON object"


def _reason(task: str, record: Record) -> str:
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
    reason = _wrong_answer(task, kind, answer) or _wrong_options(record)
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
    return Item(
        record["id"],
        record["type"],
        record.get("options") or [],
        record["answer"],
        record["response"],
        record.get("subject") or subject_in(task, str(record["id"])),
    )
