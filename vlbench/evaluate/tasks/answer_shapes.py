"""The files in which answers come: JSON lines, arrays, and what MMMU's own code reads and writes.

[{"id", "question_type", "all_choices", "index2ans", "answer", "response" | "parsed_pred"}, ...]
one array, or one such object by its id, a line
{"validation_Art_1": "B", ...}              total_val_output.json, for main_eval_only.py
{"validation_Art_1": {"question_type", "ground_truth"}, ...}      answer_dict_val.json
SUBJECT/output.json                         a folder of arrays, for main_parse_and_eval.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlbench.evaluate.tasks.cells import literal
from vlbench.evaluate.tasks.items import letters
from vlbench.evaluate.tasks.mmmu_data import SUBJECTS
from vlbench.files import read_text
from vlbench.mistakes import Mistake

Record = dict[str, Any]
OUTPUT = "output.json"
RECORD = {"id", "type", "question_type", "response", "parsed_pred", "answer"}  # keys of one record
_PRINTED = re.compile(r"[\[{]\s*\n\s+")  # a text of JSON on several lines


def read_shapes(path: Path) -> list[tuple[str, Record | str]]:
    """Return (where, record) of every answer; instead of a record a text says what is wrong.

    A record has the keys of our own lines wherever it has those of MMMU. Raises a Mistake for a
    file that cannot be read as a whole.
    """
    if path.is_dir():
        files = [path / name / OUTPUT for name in SUBJECTS if (path / name / OUTPUT).is_file()]
        if not files:
            raise Mistake(f"answers is '{path}', a folder without SUBJECT/{OUTPUT}")
        return [one for file in files for one in read_shapes(file)]
    text = _text(path)
    return [(f"{path}: {where}", _ours(one)) for where, one in _records(path, text)]


def _text(path: Path) -> str:
    """Return the text of a file; bytes that are no UTF-8 spoil their own line alone."""
    try:
        return read_text(path)
    except Mistake:
        if not path.is_file():
            raise
        data = path.read_bytes()
        if b"\0" in data:
            raise Mistake(f"{path}: is no text of JSON, but a binary file") from None
        return data.decode("utf-8-sig", "surrogateescape")


def _records(path: Path, text: str) -> list[tuple[str, Record | str]]:
    """Return the records of a text, or what is wrong with each, and where it stands."""
    whole: Any = None
    if text.lstrip()[:1] in ("[", "{"):
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError) as error:
            if _PRINTED.match(text.lstrip()):
                raise Mistake(f"{path}: is not JSON ({error})") from error
    if isinstance(whole, dict) and not RECORD & whole.keys():
        whole = [one for identity, value in whole.items() for one in _under(identity, value)]
    several = _flat(whole) if isinstance(whole, list) else []
    if any(isinstance(one, dict) for one in several):
        return [(f"record {n}", one) for n, one in enumerate(several, 1)]
    return [
        found
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
        for found in _of_line(f"line {number}", line)
    ]


def _of_line(where: str, line: str) -> list[tuple[str, Record | str]]:
    """Return the records in one line: one, an array of them, or some by their ids."""
    value = _parsed(line)
    several = [value] if isinstance(value, str) else _flat(value[0])
    if len(several) == 1:
        return [(where, several[0])]
    return [(f"{where}, record {n}", one) for n, one in enumerate(several, 1)]


def _flat(value: Any) -> list[Record | str]:
    """Return the records in a value: itself, those of an array, or those that stand under ids."""
    if isinstance(value, list):
        return [record for one in value for record in _flat(one)]
    if not isinstance(value, dict):
        return [" is not a JSON object"]
    by_id = not RECORD & value.keys() and all(isinstance(v, dict) for v in value.values())
    several = [_of_id(*item) for item in value.items()] if by_id and value else [value]
    found = [_parsed(json.dumps(one)) for one in several]
    return [one if isinstance(one, str) else one[0] for one in found]


def _under(identity: str, value: Any) -> list[Any]:
    """Return what stands under a key of a file: an array of records, or one with that id."""
    array = isinstance(value, list) and any(isinstance(one, dict) for one in value)
    return value if array else [_of_id(identity, value)]


def _of_id(identity: str, value: Any) -> Record:
    """Return the record that stands under an id: its keys, or the response alone."""
    return {"id": identity, **(value if isinstance(value, dict) else {"response": value})}


def _parsed(line: str) -> tuple[Any] | str:
    """Return the value of JSON in a line, or what is wrong with the line."""
    try:
        line.encode()
    except UnicodeEncodeError:
        return " is not UTF-8 text"
    try:
        value = json.loads(line)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return " has half of a surrogate pair in it, which is no text"
    except (ValueError, RecursionError) as error:
        return f" is not JSON ({error})"
    return (value,)


def _ours(record: Record | str) -> Record | str:
    """Return a record with our keys beside MMMU's, or what is wrong with it."""
    if isinstance(record, str):
        return record
    made = dict(record)
    for ours, theirs in (("type", "question_type"), ("answer", "ground_truth")):
        if ours not in made and theirs in made:
            made[ours] = made[theirs]
    if "response" not in made and "parsed_pred" in made:
        made["response"] = made["parsed_pred"]
    if isinstance(made.get("options"), str):  # as in the hub's data
        value = literal(made["options"])
        made["options"] = list(value) if isinstance(value, list | tuple) else made["options"]
    if "options" not in made and ("all_choices" in made or "index2ans" in made):
        options = _options(made.get("all_choices"), made.get("index2ans"))
        if isinstance(options, str):
            return f" ({made.get('id')}): {options}"
        made["options"] = options
    return made


def _options(choices: Any, texts: Any) -> list[Any] | str:
    """Return the options in the order of their letters, or what is wrong with them."""
    if not choices and not texts:
        return []  # an open question
    if not isinstance(texts, Mapping):
        return "all_choices without index2ans, the texts of the options"
    choices = list(texts) if choices is None else choices
    if not isinstance(choices, list) or choices != list(letters(choices)):
        return f"all_choices is {json.dumps(choices):.60}; wanted are the letters from A on"
    missing = [letter for letter in choices if letter not in texts]
    if missing:
        return f"index2ans has no {', '.join(missing)}"
    return [texts[letter] for letter in choices]
