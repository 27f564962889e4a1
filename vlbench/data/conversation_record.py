"""A record of a conversation becomes a sample. Imports no torch.

Two formats are read: LLaVA's `conversations` of turns with `from` and `value`, and `messages` with
`role` and `content`. Images come from `image` or `images`, or from parts of a content; a system
prompt may be in `system`. Other keys of a record are listed in `Sample.unread_keys`, or refused
(`record_keys.py`).
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
"""Role names are compared in lower case."""
TURN_KEYS = ("conversations", "messages")
IMAGE_KEYS = ("image", "images")
USED_KEYS = ("id", "system", *TURN_KEYS, *IMAGE_KEYS)
IMAGE_TAG = "<image>"  # LLaVA's spelling of IMAGE_PLACEHOLDER
EXPECTED_RECORD = (
    '"conversations": [{"from": "human", "value": "<image>\\nQuestion"}, '
    '{"from": "gpt", "value": "Answer"}]'
)

LOSS_SWITCH_KEYS = ("loss", "loss_mask", "loss_scale", "train", "trainable", "weight")
"""Keys of a turn that exclude an answer from the loss in other programs, when false or 0."""

IMAGE_PATH_TAG = re.compile(r"<img>.*?</img>", re.IGNORECASE | re.DOTALL)
MEDIA_TAG = re.compile(
    IMAGE_PATH_TAG.pattern + r"|</image>|!\[[^\]]*\]\(data:[^)\s]*"
    r"|<\|?\s*((start|end)_of_)?(image|img|video|audio|vision(?=_))"
    r"([ _-]?(pad|start|end|here|context|placeholder|token|soft_token|bos|eos|\d+))*\s*/?\|?>",
    re.IGNORECASE | re.DOTALL,
)
"""Tags of other programs for images, videos and sound; `<image>` is replaced before."""

BASE64_TEXT = re.compile(r"[A-Za-z0-9+/=\s]{200,}")  # a path of that length has other characters
"""The bytes of an image as base64 text."""
MAX_PATH_LENGTH = 4096  # characters, as on Linux


@dataclass
class _PartialRecord:
    """What has been read of a record so far."""

    name: str
    turns: list[ChatTurn]
    image_names: list[str]
    unread_keys: list[str]


def sample_from_record(
    record: Any, fallback_name: str, find_image: Callable[[str], LazyImage]
) -> Sample:
    """Return the sample of a record, or raise BadSample.

    `fallback_name` is its id where it has none; `find_image` returns the image of an image name. A
    single image without a tag in the text is put before the first human turn's text.
    """
    try:
        return _read_record(record, fallback_name, find_image)
    except RecursionError:
        raise BadSample(fallback_name, "its lists or mappings are nested too deeply") from None


def _read_record(record: Any, fallback_name: str, find_image: Callable[[str], LazyImage]) -> Sample:
    if not isinstance(record, dict):
        raise BadSample(fallback_name, f"is {describe_json_type(record)}; expected a mapping")
    name = _record_name(record, fallback_name)
    turns_key = _turns_key(name, record)
    partial = _PartialRecord(name, [], _image_names(name, record), [])
    listed_images = len(partial.image_names)
    for number, turn in enumerate(record[turns_key], start=1):
        _add_turn(partial, turn, number)
    if 0 < listed_images < len(partial.image_names):
        raise BadSample(
            name, f"has images in 'image' and in parts of {turns_key!r}; expected one way"
        )
    partial.unread_keys[:0] = find_unread_keys(name, record, USED_KEYS, partial.image_names)
    _add_system_turn(partial, record.get("system"))
    images = tuple(find_image(image_name) for image_name in partial.image_names)
    has_tag = any(IMAGE_PLACEHOLDER in turn.text for turn in partial.turns)
    is_untagged = bool(images) and not has_tag
    _refuse_media_tags(partial)
    turns = partial.turns
    if is_untagged and len(images) == 1:
        turns = _insert_image_tag(turns)
    sample = Sample(
        name,
        tuple(turns),
        images,
        _detect_language(turns),
        unread_keys=tuple(dict.fromkeys(partial.unread_keys)),
        is_untagged=is_untagged,
    )
    check_sample(sample)
    return sample


def _record_name(record: dict[str, Any], fallback_name: str) -> str:
    """Return the id of a record as text, the fallback where it has none."""
    record_id = record.get("id")
    if not isinstance(record_id, str | int | float) or isinstance(record_id, bool):
        return fallback_name
    return escape_surrogates(str(record_id)) if str(record_id).strip() else fallback_name


def record_from_sample(sample: Sample, image_names: list[str]) -> dict[str, Any]:
    """Return a record in LLaVA's format from which `sample` is read, with these image names."""
    llava_roles = {"human": "human", "assistant": "gpt", "system": "system"}
    turns = [{"from": llava_roles[turn.role], "value": turn.text} for turn in sample.turns]
    return {
        "id": sample.id,
        **({"image": image_names} if image_names else {}),
        "conversations": turns,
    }


def _turns_key(name: str, record: dict[str, Any]) -> str:
    """Return the key of the turns."""
    present = [key for key in TURN_KEYS if record.get(key) is not None]
    present = [key for key in present if record[key] not in EMPTY_VALUES] or present[:1]
    if len(present) > 1:
        raise BadSample(name, "has 'conversations' and 'messages'; expected one of them")
    key = present[0] if present else TURN_KEYS[0]
    if key not in record:
        keys = ", ".join(repr(key) for key in list(record)[:10]) or "none"
        suggestions = (suggest_name(str(key), TURN_KEYS[:1]) for key in record)
        suggestion = next(filter(None, suggestions), "")
        raise BadSample(
            name, f"has no {key!r}; its keys are {keys}; expected {EXPECTED_RECORD}.{suggestion}"
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
    image_names: list[str] = []
    for key in IMAGE_KEYS:
        value = record.get(key)
        listed = [] if value is None else value if isinstance(value, list) else [value]
        for image_name in listed:
            _check_image_name(name, image_name, f"{key!r} is {describe_json_type(value)}")
        if image_names and listed and listed != image_names:
            raise BadSample(name, "has other images in 'image' than in 'images'; expected one")
        image_names = listed or image_names
    return image_names


def _check_image_name(name: str, image_name: Any, described: str) -> None:
    """Raise BadSample for what is not a file name; `described` says what was given."""
    if not isinstance(image_name, str) or not image_name.strip() or "\0" in image_name:
        raise BadSample(name, f"{described}; expected a file name or a list")
    if (
        DATA_URI.match(image_name[:20])
        or BASE64_TEXT.fullmatch(image_name)
        or len(image_name) > MAX_PATH_LENGTH
    ):
        raise BadSample(
            name, f"{described}, an image as text; write it to a file and give its name"
        )
    if URL_PREFIX.match(image_name):
        raise BadSample(name, f"{described}, a URL; download it into data.images and give its name")


def _add_turn(partial: _PartialRecord, turn: Any, number: int) -> None:
    """Read a turn: its role and text, and images that are parts of its content."""

    def refuse_turn(reason: str) -> BadSample:
        return BadSample(partial.name, f"turn {number}: {reason}")

    if not isinstance(turn, dict):
        raise refuse_turn(
            f"is {describe_json_type(turn)}; expected a mapping with 'from' and 'value'"
        )
    is_message = "role" in turn and "from" not in turn
    role_key, text_key = ("role", "content") if is_message else ("from", "value")
    for key in (role_key, text_key):
        if key not in turn:
            raise refuse_turn(
                f"has no {key!r}; its keys are {', '.join(map(repr, turn)) or 'none'}"
            )
    role = _parse_role(turn[role_key], role_key, refuse_turn)
    text = _parse_turn_text(partial, turn[text_key], text_key, refuse_turn)
    if not text.strip():
        raise refuse_turn(
            f"the text of {turn[role_key]!r} is empty; leave out the turn or the record"
        )
    loss_switch = next((key for key in LOSS_SWITCH_KEYS if turn.get(key) in (False, 0)), "")
    if loss_switch and role == "assistant":
        raise refuse_turn(
            f"{loss_switch!r} is {turn[loss_switch]!r}; every answer is learned, so leave out the "
            "turn"
        )
    text = text.replace(IMAGE_TAG, IMAGE_PLACEHOLDER) if role == "human" else text
    unread_keys = find_unread_keys(
        partial.name, turn, (role_key, text_key), partial.image_names, f"turn {number}: "
    )
    partial.unread_keys += [f"turn {key}" for key in unread_keys]
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
    """Return the text of a content in parts (transformers' chat format); add its images.

    An image and a text are joined by a newline, two images by nothing.
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
                partial.name, value, f"an image of 'content' is {describe_json_type(value)}"
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
    """Record the keys of a content part that are not read; refuse those with content."""
    used = ("type", kind if kind in part else "path")
    try:
        keys = find_unread_keys(partial.name, part, used, [value])
    except BadSample as bad:
        raise refuse_turn(f"in a part of 'content' {bad.reason}") from bad
    partial.unread_keys += [f"turn {key}" for key in keys]


def _add_system_turn(partial: _PartialRecord, system_prompt: Any) -> None:
    """Prepend the system prompt of a record to its turns."""
    if system_prompt is None or system_prompt == "":
        return
    if not isinstance(system_prompt, str) or not system_prompt.strip():
        raise BadSample(
            partial.name, f"'system' is {describe_json_type(system_prompt)}; expected a text"
        )
    first_turn = partial.turns[0]
    if first_turn.role == "system" and first_turn.text != system_prompt:
        raise BadSample(partial.name, "has a key 'system' and another system turn; expected one")
    if first_turn.role != "system":
        partial.turns.insert(0, ChatTurn("system", system_prompt))


def _refuse_media_tags(partial: _PartialRecord) -> None:
    """Raise BadSample for a tag that means an image or a video and would be read as text."""
    for number, turn in enumerate(partial.turns, start=1):
        where = f"a turn of {turn.role!r}"
        if turn.role == "system" and (IMAGE_TAG in turn.text or IMAGE_PLACEHOLDER in turn.text):
            raise BadSample(partial.name, f"{IMAGE_TAG} in {where}; only 'human' may show images")
        pattern = IMAGE_PATH_TAG if turn.role == "assistant" else MEDIA_TAG
        match = pattern.search(turn.text.replace(IMAGE_PLACEHOLDER, ""))
        if not match:
            continue
        tag = match[0]
        if re.search("video|audio", tag, re.IGNORECASE):
            remedy = "videos and sound are not read: leave the record out, or show frames"
        else:
            remedy = f"name the file in 'image' and write {IMAGE_TAG} where the image belongs"
        raise BadSample(partial.name, f"turn {number}: {tag!r} shows nothing here; {remedy}")


def _insert_image_tag(turns: list[ChatTurn]) -> list[ChatTurn]:
    """Put the tag of the only image before the first human text."""
    first = next((n for n, turn in enumerate(turns) if turn.role == "human"), None)
    if first is None:
        return turns
    tagged = ChatTurn("human", f"{IMAGE_PLACEHOLDER}\n{turns[first].text}")
    return [*turns[:first], tagged, *turns[first + 1 :]]


def _detect_language(turns: list[ChatTurn]) -> str:
    """Return "zh" when a turn holds Chinese characters, otherwise "en"."""
    chinese = any("\u4e00" <= character <= "\u9fff" for turn in turns for character in turn.text)
    return "zh" if chinese else "en"
