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

from vlbench.errors import UserError
from vlbench.evaluate.tasks.mmmu_data import MMMU_SUBJECTS
from vlbench.evaluate.tasks.record_fields import parse_literal
from vlbench.evaluate.tasks.scored_items import option_letters
from vlbench.text_files import read_text

AnswerRecord = dict[str, Any]
OUTPUT_FILE = "output.json"
RECORD_KEYS = {
    "id",
    "type",
    "question_type",
    "response",
    "parsed_pred",
    "answer",
}  # keys of one record
_PRETTY_PRINTED_JSON = re.compile(r"[\[{]\s*\n\s+")  # a text of JSON on several lines


def read_answer_records(path: Path) -> list[tuple[str, AnswerRecord | str]]:
    """Return (where, record) of every answer; instead of a record a text says what is wrong.

    A record has the keys of our own lines wherever it has those of MMMU. Raises a Mistake for a
    file that cannot be read as a whole.
    """
    if path.is_dir():
        files = [
            path / name / OUTPUT_FILE
            for name in MMMU_SUBJECTS
            if (path / name / OUTPUT_FILE).is_file()
        ]
        if not files:
            raise UserError(f"answers is '{path}', a folder without SUBJECT/{OUTPUT_FILE}")
        return [one for file in files for one in read_answer_records(file)]
    text = _read_lenient_text(path)
    return [
        (f"{path}: {where}", _add_vlbench_keys(one)) for where, one in _parse_records(path, text)
    ]


def _read_lenient_text(path: Path) -> str:
    """Return the text of a file; bytes that are no UTF-8 spoil their own line alone."""
    try:
        return read_text(path)
    except UserError:
        if not path.is_file():
            raise
        data = path.read_bytes()
        if b"\0" in data:
            raise UserError(f"{path}: is no text of JSON, but a binary file") from None
        return data.decode("utf-8-sig", "surrogateescape")


def _parse_records(path: Path, text: str) -> list[tuple[str, AnswerRecord | str]]:
    """Return the records of a text, or what is wrong with each, and where it stands."""
    whole: Any = None
    if text.lstrip()[:1] in ("[", "{"):
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError) as error:
            if _PRETTY_PRINTED_JSON.match(text.lstrip()):
                raise UserError(f"{path}: is not JSON ({error})") from error
    if isinstance(whole, dict) and not RECORD_KEYS & whole.keys():
        whole = [
            one for identity, value in whole.items() for one in _records_under_key(identity, value)
        ]
    several = _flatten_records(whole) if isinstance(whole, list) else []
    if any(isinstance(one, dict) for one in several):
        return [(f"record {n}", one) for n, one in enumerate(several, 1)]
    return [
        found
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
        for found in _parse_line(f"line {number}", line)
    ]


def _parse_line(location: str, line: str) -> list[tuple[str, AnswerRecord | str]]:
    """Return the records in one line: one, an array of them, or some by their ids."""
    value = _parse_json_line(line)
    several = [value] if isinstance(value, str) else _flatten_records(value[0])
    if len(several) == 1:
        return [(location, several[0])]
    return [(f"{location}, record {n}", one) for n, one in enumerate(several, 1)]


def _flatten_records(value: Any) -> list[AnswerRecord | str]:
    """Return the records in a value: itself, those of an array, or those that stand under ids."""
    if isinstance(value, list):
        return [record for one in value for record in _flatten_records(one)]
    if not isinstance(value, dict):
        return [" is not a JSON object"]
    by_id = not RECORD_KEYS & value.keys() and all(isinstance(v, dict) for v in value.values())
    several = [_record_of_id(*item) for item in value.items()] if by_id and value else [value]
    found = [_parse_json_line(json.dumps(one)) for one in several]
    return [one if isinstance(one, str) else one[0] for one in found]


def _records_under_key(key: str, value: Any) -> list[Any]:
    """Return what stands under a key of a file: an array of records, or one with that id."""
    array = isinstance(value, list) and any(isinstance(one, dict) for one in value)
    return value if array else [_record_of_id(key, value)]


def _record_of_id(record_id: str, value: Any) -> AnswerRecord:
    """Return the record that stands under an id: its keys, or the response alone."""
    return {"id": record_id, **(value if isinstance(value, dict) else {"response": value})}


def _parse_json_line(line: str) -> tuple[Any] | str:
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


def _add_vlbench_keys(record: AnswerRecord | str) -> AnswerRecord | str:
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
        value = parse_literal(made["options"])
        made["options"] = list(value) if isinstance(value, list | tuple) else made["options"]
    if "options" not in made and ("all_choices" in made or "index2ans" in made):
        options = _options_in_order(made.get("all_choices"), made.get("index2ans"))
        if isinstance(options, str):
            return f" ({made.get('id')}): {options}"
        made["options"] = options
    return made


def _options_in_order(choice_letters: Any, option_texts: Any) -> list[Any] | str:
    """Return the options in the order of their letters, or what is wrong with them."""
    if not choice_letters and not option_texts:
        return []  # an open question
    if not isinstance(option_texts, Mapping):
        return "all_choices without index2ans, the texts of the options"
    choice_letters = list(option_texts) if choice_letters is None else choice_letters
    if not isinstance(choice_letters, list) or choice_letters != list(
        option_letters(choice_letters)
    ):
        return f"all_choices is {json.dumps(choice_letters):.60}; wanted are the letters from A on"
    missing = [letter for letter in choice_letters if letter not in option_texts]
    if missing:
        return f"index2ans has no {', '.join(missing)}"
    return [option_texts[letter] for letter in choice_letters]
