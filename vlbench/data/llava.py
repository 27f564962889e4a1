"""LLaVA's JSON: a list of records with `id`, `image` and `conversations`. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlbench.data.images import File
from vlbench.data.sample import PLACEHOLDER, Picture, Sample, Turn, check
from vlbench.mistakes import BadSample, Mistake, nearest

ROLES = {
    "human": "human",
    "user": "human",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
TAG = "<image>"  # LLaVA's spelling of PLACEHOLDER
MAX_STATS = 100_000


class LlavaJson:
    """The samples of a file of records (JSON, or JSONL with one record per line).

    Records stay as they were parsed; a record is looked at when its sample is asked for. Records
    are counted from 1 in reports. `<image>` in a human turn means PLACEHOLDER.
    """

    def __init__(self, file: str | Path, images: str | Path | None = None) -> None:
        """Read `file`; its image names are looked up in the folder `images` (default: its own).

        Raises a Mistake when the file is missing, malformed or without records.
        """
        self.name = str(file)
        self.images = Path(images) if images is not None else Path(file).parent
        if not self.images.is_dir():
            raise Mistake(f"images: there is no folder {self.images}")
        self.records = read_records(Path(file))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        """Return the sample of record `index` (from 0), or raise BadSample."""
        return sample_of_record(
            self.records[index],
            f"record {index + 1}",
            lambda image: File(str(self.images / image)),
        )

    def faults(self) -> list[BadSample]:
        """Return every record that is malformed or names an image file that does not exist.

        At most MAX_STATS different files are looked up.
        """
        faults: list[BadSample] = []
        exists: dict[str, bool] = {}
        for index in range(len(self)):
            try:
                sample = self[index]
            except BadSample as fault:
                faults.append(fault)
                continue
            for picture in sample.pictures:
                if picture.name not in exists and len(exists) < MAX_STATS:
                    exists[picture.name] = os.path.exists(picture.name)  # never raises
                if not exists.get(picture.name, True):
                    faults.append(BadSample(sample.id, f"image {picture.name}: does not exist"))
                    break
        return faults


def sample_of_record(record: Any, name: str, picture_of: Callable[[str], Picture]) -> Sample:
    """Return the sample of a record, or raise BadSample.

    `name` is what it is called where it has no id, `picture_of` gives the picture of an image name.
    """
    if not isinstance(record, dict):
        raise BadSample(name, f"is {_kind(record)}; expected a mapping")
    if isinstance(record.get("id"), str | int) and str(record["id"]):
        name = str(record["id"])
    pictures = tuple(picture_of(image) for image in _images(name, record))
    turns = _turns(name, record)
    if len(pictures) == 1 and not any(PLACEHOLDER in turn.text for turn in turns):
        turns = _with_tag(turns)
    sample = Sample(name, tuple(turns), pictures, _language(turns))
    check(sample)
    return sample


def read_records(file: Path) -> list[Any]:
    """Parse a JSON list, or JSONL when the file's name ends in .jsonl.

    Raises a Mistake with file, line and column.
    """
    text = _text(file)
    if not text.strip():
        raise Mistake(f"data {file}: the file is empty; expected a JSON list of records")
    if file.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), start=1)
        return [_parse(line, file, number) for number, line in lines if line.strip()]
    records = _parse(text, file)
    if not isinstance(records, list):
        raise Mistake(f"data {file}: line 1 holds {_kind(records)}; expected a list of records")
    if not records:
        raise Mistake(f"data {file}: the list holds no records")
    return records


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        near = nearest(file.name, [p.name for p in file.parent.glob("*.json*")])
        raise Mistake(f"data {file}: there is no such file.{near}") from None
    except IsADirectoryError:
        raise Mistake(f"data {file}: is a folder; expected a JSON file") from None
    except OSError as error:
        raise Mistake(f"data {file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        start = error.object.rfind(b"\n", 0, error.start) + 1
        line = error.object.count(b"\n", 0, error.start) + 1
        where = f"line {line}, byte {error.start - start + 1}"
        raise Mistake(f"data {file}: {where}: not UTF-8; save the file as UTF-8") from None


def _parse(text: str, file: Path, line: int | None = None) -> Any:
    """Parse JSON text; `line` is the number of this line where every line is a text of its own."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {line or error.lineno}, column {error.colno}"
        hint = "; one record per line? then name the file .jsonl" if _like_lines(error) else ""
        what = error.msg[:1].lower() + error.msg[1:]
        raise Mistake(f"data {file}: {where}: {what}{hint}") from None
    except RecursionError:
        raise Mistake(f"data {file}: lists are nested too deeply; expected records") from None


def _like_lines(error: json.JSONDecodeError) -> bool:
    return error.msg == "Extra data" and error.doc.lstrip().startswith("{")


def _kind(value: Any) -> str:
    """Name the JSON type of a value, with its beginning."""
    kinds = {dict: "a mapping", list: "a list", str: "a text", bool: "a truth value"}
    if value is None:
        return "null"
    text = json.dumps(value, ensure_ascii=False)
    return f"{kinds.get(type(value), 'a number')} ({text[:40]}{'...' if len(text) > 40 else ''})"


def _images(name: str, record: dict[str, Any]) -> list[str]:
    """Return the image names of a record: `image` is a text, a list of texts, null or absent."""
    value = record.get("image")
    images = [] if value is None else value if isinstance(value, list) else [value]
    for image in images:
        if not isinstance(image, str) or not image.strip() or "\0" in image:
            raise BadSample(name, f"'image' is {_kind(value)}; expected a file name or a list")
    return images


def _turns(name: str, record: dict[str, Any]) -> list[Turn]:
    if "conversations" not in record:
        keys = ", ".join(repr(key) for key in list(record)[:10]) or "none"
        raise BadSample(name, f"has no 'conversations'; its keys are {keys}")
    turns = record["conversations"]
    if not isinstance(turns, list):
        raise BadSample(name, f"'conversations' is {_kind(turns)}; expected a list of turns")
    if not turns:
        raise BadSample(name, "the conversation is empty")
    return [_turn(turn, _refuse(name, number)) for number, turn in enumerate(turns, start=1)]


def _refuse(name: str, number: int) -> Callable[[str], BadSample]:
    return lambda reason: BadSample(name, f"turn {number}: {reason}")


def _turn(turn: Any, refuse: Callable[[str], BadSample]) -> Turn:
    if not isinstance(turn, dict):
        raise refuse(f"is {_kind(turn)}; expected a mapping with 'from' and 'value'")
    for key in ("from", "value"):
        if key not in turn:
            raise refuse(f"has no {key!r}; its keys are {', '.join(map(repr, turn)) or 'none'}")
        if not isinstance(turn[key], str):
            raise refuse(f"{key!r} is {_kind(turn[key])}; expected a text")
    role = ROLES.get(turn["from"])
    if role is None:
        near = nearest(turn["from"], list(ROLES))
        raise refuse(f"unknown role {turn['from']!r}; known: {', '.join(ROLES)}.{near}")
    if not turn["value"].strip():
        raise refuse(f"the text of {turn['from']!r} is empty")
    text = turn["value"]
    return Turn(role, text.replace(TAG, PLACEHOLDER) if role == "human" else text)


def _with_tag(turns: list[Turn]) -> list[Turn]:
    """Put the only image in front of the first human text."""
    first = next((n for n, turn in enumerate(turns) if turn.role == "human"), None)
    if first is None:
        return turns
    tagged = Turn("human", f"{PLACEHOLDER}\n{turns[first].text}")
    return [*turns[:first], tagged, *turns[first + 1 :]]


def _language(turns: list[Turn]) -> str:
    """Return "zh" when a turn holds Chinese characters, otherwise "en"."""
    chinese = any("\u4e00" <= character <= "\u9fff" for turn in turns for character in turn.text)
    return "zh" if chinese else "en"
