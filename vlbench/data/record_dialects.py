"""Records of many programs as one: turns in `conversations`, images in `image`. Imports no torch.

What each dialect looks like is in docs/reference/data_formats.md. A record tells its dialect by its
keys, so that those of one file may differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from vlbench.data.record_keys import EMPTY_VALUES, media_kind

TURN_KEYS = ("conversations", "messages")
OTHER_TURN_KEYS = ("conversation", "texts")
"""Keys of turns that are lists of mappings, and something else in other records."""
IMAGE_KEYS = ("image", "images")
FLAT_IMAGE_KEYS = (
    *IMAGE_KEYS,
    "image_path",
    "image_file",
    "file_name",
    "filename",
    "filepath",
    "file_path",
    "img",
    "img_path",
    "jpg",
    "png",
    "jpeg",
    "webp",
    "image_url",
    "url",
)
"""Keys of the image in a record that is a row: an image with its caption, or with a question."""
PAIR_KEYS = (
    ("user", "assistant"),
    ("human", "assistant"),
    ("question", "answer"),
    ("query", "response"),
    ("instruction", "output"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("input", "output"),
)
"""What is asked and what is answered: of a row, or of each entry in a list of turns."""
CAPTION_KEYS = ("caption", "text", "title", "txt")
QUESTION_KEYS = ("question", "query", "instruction", "prompt")
QUESTION_ID = "question_id"
EXTRA_INPUT = "input"  # of Alpaca's rows: a text that the instruction is about


@dataclass(frozen=True)
class TurnsRecord:
    """A record with its turns in one of TURN_KEYS and its images in IMAGE_KEYS."""

    record: Mapping[str, Any]
    are_images_first: bool = False
    """Whether images without a tag are read before the first text, however many there are."""
    own_keys: Mapping[str, str] = field(default_factory=dict)
    """What the record itself calls `image`, `human` and `gpt`, where it has other keys."""


def is_record(value: Mapping[str, Any]) -> bool:
    """Tell whether a mapping has the keys of a record, in any dialect."""
    return any(key in value for key in (*TURN_KEYS, *OTHER_TURN_KEYS)) or _is_row(value)


def has_turns(record: Mapping[str, Any]) -> bool:
    """Tell whether a record is a conversation, or a question with its answer."""
    return (
        any(key in record for key in TURN_KEYS)
        or any(_are_turns(record.get(key)) for key in OTHER_TURN_KEYS)
        or _find_pair(record) is not None
    )


def _are_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def unify_record(record: Mapping[str, Any]) -> TurnsRecord:
    """Return a record with its turns in a key of TURN_KEYS; as it is where no dialect fits."""
    for key in TURN_KEYS:
        if record.get(key) not in EMPTY_VALUES:
            unified = {**record, key: _expand_pairs(record[key])}
            return TurnsRecord(unified, own_keys=_pair_names(record[key]))
    for key in OTHER_TURN_KEYS:
        turns = record.get(key)
        if turns is not None and _are_turns(turns):
            others = {name: value for name, value in record.items() if name != key}
            unified = {**others, "conversations": _expand_pairs(turns)}
            return TurnsRecord(unified, key == "texts", _pair_names(turns))
    return _unify_row(record) if _is_row(record) else TurnsRecord(record)


def _expand_pairs(turns: Any) -> Any:
    """Return turns in which an entry with a question and its answer is two turns."""
    if not isinstance(turns, list):
        return turns
    return [turn for entry in turns for turn in _iterate_turns(entry)]


def _pair_names(turns: Any) -> dict[str, str]:
    """Return what the first turn calls the question and the answer, if it is a pair."""
    first = turns[0] if isinstance(turns, list) and turns else None
    pair = _find_pair(first) if isinstance(first, dict) and _may_be_pair(first) else None
    return dict(zip(("human", "gpt"), pair or (), strict=False))


def _may_be_pair(entry: Mapping[str, Any]) -> bool:
    return "role" not in entry and "from" not in entry


def _iterate_turns(entry: Any) -> Iterator[Any]:
    pair = _find_pair(entry) if isinstance(entry, dict) and _may_be_pair(entry) else None
    if pair is None:
        yield entry
        return
    asked, answered = pair
    others = {key: value for key, value in entry.items() if key not in pair}
    yield {"from": "human", "value": entry[asked]}
    yield {"from": "gpt", "value": entry[answered], **others}


def _find_pair(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the keys of a question and its answer that a record has, None for none."""
    return next((pair for pair in PAIR_KEYS if all(key in record for key in pair)), None)


def _find_image_key(record: Mapping[str, Any]) -> str | None:
    """Return the key of a row's image; the `url` of a question may be that of a page."""
    for key in FLAT_IMAGE_KEYS:
        value = record.get(key)
        is_page = key == "url" and _find_pair(record) and media_kind(str(value)) != "image"
        if value not in EMPTY_VALUES and not is_page:
            return key
    return None


def _is_row(record: Mapping[str, Any]) -> bool:
    """Tell whether a record is a question and its answer, or an image and its caption."""
    if any(key in record for key in TURN_KEYS):
        return False
    has_caption = any(key in record for key in CAPTION_KEYS)
    return _find_pair(record) is not None or (has_caption and _find_image_key(record) is not None)


def _unify_row(row: Mapping[str, Any]) -> TurnsRecord:
    """Return the conversation of a row; its other keys stay."""
    image_key, pair = _find_image_key(row), _find_pair(row)
    used = {image_key, *(pair or ())}
    if pair is None:
        present = [key for key in CAPTION_KEYS if key in row]
        caption_key = next((key for key in present if row[key] is not None), present[0])
        used.add(caption_key)
        question, answer = "<image>", row[caption_key]
        own_keys = {"gpt": caption_key}
    else:
        own_keys = {"human": pair[0], "gpt": pair[1]}
        question, answer = row[pair[0]], row[pair[1]]
        if pair[0] == "instruction" and EXTRA_INPUT in row:
            used.add(EXTRA_INPUT)
            question = _join_input(question, row[EXTRA_INPUT])
    unified = {key: value for key, value in row.items() if key not in used}
    if image_key:
        unified["image"] = row[image_key]
        own_keys["image"] = image_key
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return TurnsRecord({**unified, "conversations": turns}, own_keys=own_keys)


def row_problem(unified: TurnsRecord) -> str:
    """Return why a row that is read as an image with its caption is another thing, "" for none."""
    key = unified.own_keys.get("gpt")
    if key is None or "human" in unified.own_keys:
        return ""
    return caption_problem(unified.record, key, unified.record["conversations"][1]["value"])


def caption_problem(record: Mapping[str, Any], key: str, caption: Any) -> str:
    """Return why `caption`, of the key `key`, is none or has a question, "" for a caption.

    LLaVA's files of questions (of POPE, MME and others) have the question in `text`.
    """
    for question_key in QUESTION_KEYS:
        if record.get(question_key) not in (*EMPTY_VALUES, caption):
            return (
                f"{question_key!r} is not read beside a caption ({key!r}): call the answer "
                "'answer' if it is one, else leave the key out"
            )
    if record.get(QUESTION_ID) not in EMPTY_VALUES:
        return (
            f"{key!r} is a question, as the record has {QUESTION_ID!r}; write 'question' and "
            "'answer'"
        )
    return ""


def _join_input(instruction: Any, extra_input: Any) -> Any:
    """Return an instruction with the text that it is about on a line of its own, as Alpaca has."""
    if extra_input in EMPTY_VALUES or not isinstance(instruction, str):
        return instruction
    return f"{instruction}\n{extra_input}"
