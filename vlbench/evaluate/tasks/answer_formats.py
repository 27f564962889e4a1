"""The formats of answer files: JSON lines, arrays, and those that MMMU's own code reads and writes.

[{"id", "question_type", "all_choices", "index2ans", "answer", "response" | "parsed_pred"}, ...]
one array, or one such object by its id, a line
{"validation_Art_1": "B", ...}              total_val_output.json, for main_eval_only.py
{"validation_Art_1": {"question_type", "ground_truth"}, ...}      answer_dict_val.json
SUBJECT/output.json                         a folder of arrays, for main_parse_and_eval.py

And what lmms-eval logs, a line for every question: {"doc_id", "filtered_resps", "mmmu_acc": {"id",
"subdomain", "question_type", "answer", "parsed_pred"}}; options are those of data=.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlbench.errors import UserError
from vlbench.evaluate.tasks.benchmark_records import parse_literal
from vlbench.evaluate.tasks.benchmark_types import MMMU_SUBJECTS, option_letters
from vlbench.regular_files import MAX_RECORDS_BYTES, describe_failure, read_regular_text
from vlbench.text_files import parse_json, refuse_lfs_pointer

AnswerRecord = dict[str, Any]
OUTPUT_FILE = "output.json"
RECORD_KEYS = {"id", "type", "question_type", "response", "parsed_pred", "answer"}
"""A JSON object with any of these is a record; another one holds records by their ids."""
KEY_ALIASES = {"type": "question_type", "answer": "ground_truth", "response": "parsed_pred"}
"""Keys of vlbench's records -> keys of MMMU's."""
LOGGED_RESPONSES = "filtered_resps"
"""The key of lmms-eval's lines for what a model said."""
LOGGED_KEYS = {
    "id": "id",
    "type": "question_type",
    "answer": "answer",
    "subject": "subdomain",
}
"""Keys of vlbench's records -> keys of what lmms-eval logs as a metric of a question."""
_PRETTY_PRINTED_JSON = re.compile(r"[\[{]\s*\n\s+")  # JSON over several lines


def read_answer_records(path: Path) -> list[tuple[str, AnswerRecord | str]]:
    """Return (location, record) of every answer; instead of a record a text says what is wrong.

    A record has vlbench's keys beside MMMU's. Raises a UserError for a file that cannot be read as
    a whole.
    """
    if path.is_dir():
        files = [path / subject / OUTPUT_FILE for subject in MMMU_SUBJECTS]
        files = [file for file in files if file.is_file()]
        if not files:
            raise UserError(f"answers is '{path}', a folder without SUBJECT/{OUTPUT_FILE}")
        return [located for file in files for located in read_answer_records(file)]
    text = _read_lenient_text(path)
    return [
        (f"{path}: {location}", _add_vlbench_keys(record))
        for location, record in _parse_records(path, text)
    ]


def _read_lenient_text(path: Path) -> str:
    """Return the text of a file; bytes that are not UTF-8 invalidate their own line alone."""
    refuse_lfs_pointer(path)
    try:
        return read_regular_text(path, MAX_RECORDS_BYTES, errors="surrogateescape")
    except (OSError, UserError) as error:
        raise UserError(f"{path}: {describe_failure(error)}") from None


def _parse_records(path: Path, text: str) -> list[tuple[str, AnswerRecord | str]]:
    """Return the locations and records of a text, or what is wrong with each."""
    value: Any = None
    if text.lstrip()[:1] in ("[", "{"):
        try:
            value = parse_json(text)
        except ValueError as error:
            if _PRETTY_PRINTED_JSON.match(text.lstrip()):
                raise UserError(f"{path}: is not JSON ({error})") from error
    if isinstance(value, dict) and not RECORD_KEYS & value.keys():
        value = [record for item in value.items() for record in _records_under_key(*item)]
    records = _flatten_records(value) if isinstance(value, list) else []
    if any(isinstance(record, dict) for record in records):
        return [(f"record {number}", record) for number, record in enumerate(records, 1)]
    return [
        located
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
        for located in _parse_line(f"line {number}", line)
    ]


def _parse_line(location: str, line: str) -> list[tuple[str, AnswerRecord | str]]:
    """Return the records of a line: one, an array of them, or some by their ids."""
    value = _parse_json_line(line)
    records = [value] if isinstance(value, str) else _flatten_records(value[0])
    if len(records) == 1:
        return [(location, records[0])]
    return [(f"{location}, record {number}", one) for number, one in enumerate(records, 1)]


def _flatten_records(value: Any) -> list[AnswerRecord | str]:
    """Return the records in a value: itself, those of an array, or those that it has by ids."""
    records: list[AnswerRecord | str] = []
    left = [value]
    while left:  # no recursion: lists may lie in each other as deeply as JSON allows
        one = left.pop()
        if isinstance(one, list):
            left += reversed(one)
        else:
            records += _check_records(one)
    return records


def _check_records(value: Any) -> list[AnswerRecord | str]:
    """Return the records in a value that is no array."""
    if not isinstance(value, dict):
        return [" is not a JSON object"]
    by_id = not RECORD_KEYS & value.keys() and all(isinstance(v, dict) for v in value.values())
    records = [_record_of_id(*item) for item in value.items()] if by_id and value else [value]
    try:
        checked = [_parse_json_line(json.dumps(record)) for record in records]
    except RecursionError:
        return [" is nested too deeply"]
    return [one if isinstance(one, str) else one[0] for one in checked]


def _records_under_key(key: str, value: Any) -> list[Any]:
    """Return the records under a key of a file: those of an array, or one with that id."""
    is_array = isinstance(value, list) and any(isinstance(one, dict) for one in value)
    return value if is_array else [_record_of_id(key, value)]


def _record_of_id(record_id: str, value: Any) -> AnswerRecord:
    """Return the record under an id: its keys, or the response alone."""
    return {"id": record_id, **(value if isinstance(value, dict) else {"response": value})}


def _parse_json_line(line: str) -> tuple[Any] | str:
    """Return (value,) of the JSON in a line, or what is wrong with the line."""
    try:
        line.encode()
    except UnicodeEncodeError:
        return " is not UTF-8 text"
    try:
        value = parse_json(line)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return " has half of a surrogate pair in it, which is no text"
    except ValueError as error:
        return f" is not JSON ({error})"
    return (value,)


def _add_vlbench_keys(record: AnswerRecord | str) -> AnswerRecord | str:
    """Return a record with vlbench's keys beside MMMU's, or what is wrong with it."""
    if isinstance(record, str):
        return record
    record = _unwrap_log_line(record) if LOGGED_RESPONSES in record else record
    completed = dict(record)
    for key, alias in KEY_ALIASES.items():
        if alias in record:
            completed.setdefault(key, record[alias])
    if isinstance(completed.get("options"), str):  # as in the hub's data
        value = parse_literal(completed["options"])
        if isinstance(value, list | tuple):
            completed["options"] = list(value)
    if "options" not in completed and ("all_choices" in completed or "index2ans" in completed):
        options = _options_in_order(completed.get("all_choices"), completed.get("index2ans"))
        if isinstance(options, str):
            return f" ({completed.get('id')}): {options}"
        completed["options"] = options
    return completed


def _unwrap_log_line(line: AnswerRecord) -> AnswerRecord:
    """Return a line of lmms-eval as a record, with the response and not with what was parsed.

    A line without a metric that names its question, as those of other tasks, stays as it is.
    """
    response = line[LOGGED_RESPONSES]
    while isinstance(response, list) and len(response) == 1:
        response = response[0]
    metrics = (value for value in line.values() if isinstance(value, dict))
    named = next((one for one in metrics if set(LOGGED_KEYS.values()) <= one.keys()), None)
    if named is None:
        return line
    return {key: named[logged] for key, logged in LOGGED_KEYS.items()} | {"response": response}


def _options_in_order(choice_letters: Any, option_texts: Any) -> list[Any] | str:
    """Return the options in the order of their letters, or what is wrong with them."""
    if not choice_letters and not option_texts:
        return []  # an open question
    if not isinstance(option_texts, Mapping):
        return "all_choices without index2ans, the texts of the options"
    letters = list(option_texts) if choice_letters is None else choice_letters
    if not isinstance(letters, list) or letters != list(option_letters(letters)):
        return f"all_choices is {json.dumps(letters):.60}; wanted are the letters from A on"
    missing = [letter for letter in letters if letter not in option_texts]
    if missing:
        return f"index2ans has no {', '.join(missing)}"
    return [option_texts[letter] for letter in letters]
