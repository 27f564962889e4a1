"""One record of conversations becomes a sample. Imports no torch.

Read are LLaVA's `conversations` of turns with `from` and `value`, and `messages` with `role` and
`content`; pictures of `image` or `images`, or parts of a content; and `system`. What else a record
holds is listed in `Sample.unread`, or refused (`record_keys.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vlbench.data.record_keys import DATA_URI, EMPTY_VALUES, URL_PREFIX, find_unread_keys
from vlbench.data.sample import IMAGE_PLACEHOLDER, ChatTurn, LazyImage, Sample, check_sample
from vlbench.errors import BadSample, describe_json_type, escape_surrogates, suggest_name

ROLE_ALIASES = {
    "human": "human",
    "user": "human",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""Capital letters are read as small ones."""
TURN_KEYS = ("conversations", "messages")
IMAGE_KEYS = ("image", "images")
USED_KEYS = ("id", "system", *TURN_KEYS, *IMAGE_KEYS)
IMAGE_TAG = "<image>"  # LLaVA's spelling of PLACEHOLDER
EXPECTED_RECORD = (
    '"conversations": [{"from": "human", "value": "<image>\\nQuestion"}, '
    '{"from": "gpt", "value": "Answer"}]'
)

LOSS_SWITCH_KEYS = ("loss", "loss_mask", "loss_scale", "train", "trainable", "weight")
"""Keys of a turn by which other programs leave an answer out of the loss, when false or 0."""

IMAGE_PATH_TAG = re.compile(r"<img>.*?</img>", re.IGNORECASE | re.DOTALL)
MEDIA_TAG = re.compile(
    IMAGE_PATH_TAG.pattern + r"|</image>|!\[[^\]]*\]\(data:[^)\s]*"
    r"|<\|?\s*((start|end)_of_)?(image|img|video|audio|vision(?=_))"
    r"([ _-]?(pad|start|end|here|context|placeholder|token|soft_token|bos|eos|\d+))*\s*/?\|?>",
    re.IGNORECASE | re.DOTALL,
)
"""Tags with which other programs show pictures, videos and sound; `<image>` is replaced before."""


BASE64_TEXT = re.compile(r"[A-Za-z0-9+/=\s]{200,}")  # a path of that length has other characters
"""The bytes of a picture as text; paths are at most 4096 characters long."""


@dataclass
class _PartialRecord:
    """What was read of a record by now."""

    name: str
    turns: list[ChatTurn]
    image_names: list[str]
    unread_keys: list[str]


def sample_from_record(
    record: Any, fallback_name: str, find_image: Callable[[str], LazyImage]
) -> Sample:
    """Return the sample of a record, or raise BadSample.

    `name` is what it is called where it has no id, `picture_of` gives the picture of an image name.
    A single picture without a tag in the text comes first in the first human turn.
    """
    if not isinstance(record, dict):
        raise BadSample(fallback_name, f"is {describe_json_type(record)}; expected a mapping")
    own = record.get("id")
    if isinstance(own, str | int | float) and not isinstance(own, bool) and str(own).strip():
        fallback_name = escape_surrogates(str(own))
    key = _turns_key(fallback_name, record)
    read = _PartialRecord(fallback_name, [], _image_names(fallback_name, record), [])
    given = len(read.image_names)
    for number, turn in enumerate(record[key], start=1):
        _add_turn(read, turn, number)
    if 0 < given < len(read.image_names):
        raise BadSample(
            fallback_name, f"has pictures in 'image' and in parts of {key!r}; expected one way"
        )
    read.unread_keys[:0] = find_unread_keys(fallback_name, record, USED_KEYS, read.image_names)
    _add_system_turn(read, record.get("system"))
    pictures = tuple(find_image(image) for image in read.image_names)
    untagged = bool(pictures) and not any(IMAGE_PLACEHOLDER in turn.text for turn in read.turns)
    _refuse_media_tags(read)
    turns = _insert_image_tag(read.turns) if untagged and len(pictures) == 1 else read.turns
    sample = Sample(
        fallback_name,
        tuple(turns),
        pictures,
        _detect_language(turns),
        unread_keys=tuple(dict.fromkeys(read.unread_keys)),
        is_untagged=untagged,
    )
    check_sample(sample)
    return sample


def record_from_sample(sample: Sample, image_names: list[str]) -> dict[str, Any]:
    """Return the record that is read as `sample`, its pictures called `images`."""
    names = {"human": "human", "assistant": "gpt", "system": "system"}
    turns = [{"from": names[turn.role], "value": turn.text} for turn in sample.turns]
    return {
        "id": sample.id,
        **({"image": image_names} if image_names else {}),
        "conversations": turns,
    }


def _turns_key(name: str, record: dict[str, Any]) -> str:
    """Return the key under which the turns are."""
    given = [key for key in TURN_KEYS if record.get(key) is not None]
    given = [key for key in given if record[key] not in EMPTY_VALUES] or given[:1]
    if len(given) > 1:
        raise BadSample(name, "has 'conversations' and 'messages'; expected one of them")
    key = given[0] if given else TURN_KEYS[0]
    if key not in record:
        keys = ", ".join(repr(key) for key in list(record)[:10]) or "none"
        near = next((one for key in record if (one := suggest_name(str(key), TURN_KEYS[:1]))), "")
        raise BadSample(
            name, f"has no {key!r}; its keys are {keys}; expected {EXPECTED_RECORD}.{near}"
        )
    if not isinstance(record[key], list):
        raise BadSample(
            name, f"{key!r} is {describe_json_type(record[key])}; expected a list of turns"
        )
    if not record[key]:
        raise BadSample(name, "the conversation is empty")
    return key


def _image_names(name: str, record: dict[str, Any]) -> list[str]:
    """Return the image names of a record: a text, a list of texts, null or absent."""
    found: list[str] = []
    for key in IMAGE_KEYS:
        value = record.get(key)
        images = [] if value is None else value if isinstance(value, list) else [value]
        for image in images:
            _check_image_name(name, image, f"{key!r} is {describe_json_type(value)}")
        if found and images and images != found:
            raise BadSample(name, "has other pictures in 'image' than in 'images'; expected one")
        found = images or found
    return found


def _check_image_name(name: str, image_name: Any, described: str) -> None:
    """Raise BadSample for what is no name of a file; `what` tells what was given."""
    if not isinstance(image_name, str) or not image_name.strip() or "\0" in image_name:
        raise BadSample(name, f"{described}; expected a file name or a list")
    if (
        DATA_URI.match(image_name[:20])
        or BASE64_TEXT.fullmatch(image_name)
        or len(image_name) > 4096
    ):
        raise BadSample(
            name, f"{described}, a picture as text; write it to a file and give its name"
        )
    if URL_PREFIX.match(image_name):
        raise BadSample(name, f"{described}, a URL; download it into data.images and give its name")


def _add_turn(partial: _PartialRecord, turn: Any, number: int) -> None:
    """Read a turn: its role and text, and pictures that are parts of it."""

    def refuse_turn(reason: str) -> BadSample:
        return BadSample(partial.name, f"turn {number}: {reason}")

    if not isinstance(turn, dict):
        raise refuse_turn(
            f"is {describe_json_type(turn)}; expected a mapping with 'from' and 'value'"
        )
    used = ("role", "content") if "role" in turn and "from" not in turn else ("from", "value")
    for key in used:
        if key not in turn:
            raise refuse_turn(
                f"has no {key!r}; its keys are {', '.join(map(repr, turn)) or 'none'}"
            )
    role = _parse_role(turn[used[0]], used[0], refuse_turn)
    text = _parse_turn_text(partial, turn[used[1]], used[1], refuse_turn)
    if not text.strip():
        raise refuse_turn(
            f"the text of {turn[used[0]]!r} is empty; leave out the turn or the record"
        )
    off = next((key for key in LOSS_SWITCH_KEYS if turn.get(key) in (False, 0)), "")
    if off and role == "assistant":
        raise refuse_turn(
            f"{off!r} is {turn[off]!r}; every answer is learned, so leave out the turn"
        )
    text = text.replace(IMAGE_TAG, IMAGE_PLACEHOLDER) if role == "human" else text
    keys = find_unread_keys(partial.name, turn, used, partial.image_names, f"turn {number}: ")
    partial.unread_keys += [f"turn {key}" for key in keys]
    partial.turns.append(ChatTurn(role, text))


def _parse_role(role_name: Any, key: str, refuse_turn: Callable[[str], BadSample]) -> str:
    if not isinstance(role_name, str):
        raise refuse_turn(f"{key!r} is {describe_json_type(role_name)}; expected a text")
    role = ROLE_ALIASES.get(role_name.strip().lower())
    if role is None:
        raise refuse_turn(
            f"unknown role {role_name!r}; known: "
            f"{', '.join(ROLE_ALIASES)}.{suggest_name(role_name, list(ROLE_ALIASES))}"
        )
    return role


def _parse_turn_text(
    partial: _PartialRecord, content: Any, key: str, refuse_turn: Callable[[str], BadSample]
) -> str:
    if key == "content" and isinstance(content, list):
        return _join_content_parts(partial, content, refuse_turn)
    if not isinstance(content, str):
        raise refuse_turn(f"{key!r} is {describe_json_type(content)}; expected a text")
    return content


def _join_content_parts(
    partial: _PartialRecord, parts: list[Any], refuse_turn: Callable[[str], BadSample]
) -> str:
    """Return the text of a content in parts, as of transformers' chat format; add its pictures.

    Between a picture and a text stands a newline, between two pictures nothing.
    """
    texts: list[str] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        value = part.get(kind, part.get("path")) if kind in ("text", "image") else None
        if kind is None or not isinstance(value, str):
            raise refuse_turn(
                f"a part of 'content' is {describe_json_type(part)}; expected "
                '{"type": "text", "text": TEXT} or {"type": "image", "image": FILE}'
            )
        _note_unread_keys(partial, part, kind, value, refuse_turn)
        if kind == "image":
            _check_image_name(
                partial.name, value, f"a picture of 'content' is {describe_json_type(value)}"
            )
            partial.image_names.append(value)
        if texts and not (kind == "image" and texts[-1] == IMAGE_PLACEHOLDER):
            texts.append("\n")
        texts.append(IMAGE_PLACEHOLDER if kind == "image" else value)
    return "".join(texts)


def _note_unread_keys(
    partial: _PartialRecord,
    part: dict[str, Any],
    kind: str,
    value: str,
    refuse_turn: Callable[[str], BadSample],
) -> None:
    """Note the keys of a part of a content that are not read; refuse those with content."""
    used = ("type", kind if kind in part else "path")
    try:
        keys = find_unread_keys(partial.name, part, used, [value])
    except BadSample as bad:
        raise refuse_turn(f"in a part of 'content' {bad.reason}") from bad
    partial.unread_keys += [f"turn {key}" for key in keys]


def _add_system_turn(partial: _PartialRecord, system_prompt: Any) -> None:
    """Put the system prompt of a record before its turns."""
    if system_prompt is None or system_prompt == "":
        return
    if not isinstance(system_prompt, str) or not system_prompt.strip():
        raise BadSample(
            partial.name, f"'system' is {describe_json_type(system_prompt)}; expected a text"
        )
    first = partial.turns[0]
    if first.role == "system" and first.text != system_prompt:
        raise BadSample(partial.name, "has a key 'system' and another system turn; expected one")
    if first.role != "system":
        partial.turns.insert(0, ChatTurn("system", system_prompt))


def _refuse_media_tags(partial: _PartialRecord) -> None:
    """Raise BadSample for a tag that would be read as text where a picture or a video was meant."""
    for number, turn in enumerate(partial.turns, start=1):
        where = f"a turn of {turn.role!r}"
        if turn.role == "system" and (IMAGE_TAG in turn.text or IMAGE_PLACEHOLDER in turn.text):
            raise BadSample(partial.name, f"{IMAGE_TAG} in {where}; only 'human' may show images")
        tags = IMAGE_PATH_TAG if turn.role == "assistant" else MEDIA_TAG
        found = tags.search(turn.text.replace(IMAGE_PLACEHOLDER, ""))
        if not found:
            continue
        tag = found[0]
        if re.search("video|audio", tag, re.IGNORECASE):
            todo = "videos and sound are not read: leave the record out, or show frames"
        else:
            todo = f"name the file in 'image' and write {IMAGE_TAG} where the picture stands"
        raise BadSample(partial.name, f"turn {number}: {tag!r} shows nothing here; {todo}")


def _insert_image_tag(turns: list[ChatTurn]) -> list[ChatTurn]:
    """Put the only image in front of the first human text."""
    first = next((n for n, turn in enumerate(turns) if turn.role == "human"), None)
    if first is None:
        return turns
    tagged = ChatTurn("human", f"{IMAGE_PLACEHOLDER}\n{turns[first].text}")
    return [*turns[:first], tagged, *turns[first + 1 :]]


def _detect_language(turns: list[ChatTurn]) -> str:
    """Return "zh" when a turn holds Chinese characters, otherwise "en"."""
    chinese = any("\u4e00" <= character <= "\u9fff" for turn in turns for character in turn.text)
    return "zh" if chinese else "en"
