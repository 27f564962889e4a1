"""A record of a conversation becomes a sample. Imports no torch.

All dialects become LLaVA's `conversations` of turns with `from` and `value`, or `messages` with
`role` and `content` (`record_dialects.py`). Images come from `image` or `images`, or from parts of
a content; a system prompt may be in `system`. Other keys of a record are listed in
`Sample.unread_keys`, or refused (`record_keys.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vlbench.data.content_parts import read_content_parts
from vlbench.data.hidden_options import refuse_hidden_options
from vlbench.data.preference_records import refuse_preferences
from vlbench.data.record_dialects import IMAGE_KEYS, TURN_KEYS, row_problem, unify_record
from vlbench.data.record_images import MAX_PATH_LENGTH, WrittenImage, read_written_image
from vlbench.data.record_keys import (
    EMPTY_VALUES,
    URL_PREFIX,
    find_unread_keys,
    image_id_key,
)
from vlbench.data.record_tags import IMAGE_TAG, refuse_box_tags, refuse_media_tags
from vlbench.data.sample import IMAGE_PLACEHOLDER, ChatTurn, LazyImage, Sample, check_sample
from vlbench.errors import BadSample, describe_json_type, escape_surrogates, suggest_name

ROLE_ALIASES = {
    "human": "human",
    "user": "human",
    "prompter": "human",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "claude": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "developer": "system",
}
"""Role names are compared in lower case."""
TEXT_KEYS = {"from": ("value", "content", "text"), "role": ("content", "value", "text")}
"""Where the text of a turn is, by the key of its role."""
USED_KEYS = ("id", "system", *TURN_KEYS, *IMAGE_KEYS)
EXPECTED_RECORD = (
    '"conversations": [{"from": "human", "value": "<image>\\nQuestion"}, '
    '{"from": "gpt", "value": "Answer"}]'
)

LOSS_SWITCH_KEYS = ("loss", "loss_mask", "loss_scale", "train", "trainable", "weight")
"""Keys of a turn that exclude an answer from the loss in other programs, when false or 0."""

CHINESE_CHARACTER = re.compile("[\u4e00-\u9fff]")
_EMBEDDED_REMEDY = ", an image as text; write it to a file and give its name"


@dataclass
class _PartialRecord:
    """What has been read of a record so far."""

    name: str
    may_embed: bool
    """Whether images may be there with their bytes."""
    turns: list[ChatTurn] = field(default_factory=list)
    images: list[WrittenImage] = field(default_factory=list)
    unread_keys: list[str] = field(default_factory=list)
    placeholder_parts: int = 0
    """Parts of a content that are the place of an image of the record's own key."""
    are_images_first: bool = False
    own_keys: Mapping[str, str] = field(default_factory=dict)
    """What the record calls `image`, `human` and `gpt`, where it has other keys."""

    @property
    def image_names(self) -> list[str]:
        """The file names of the images, "" for one whose bytes have none."""
        return [image.file_name for image in self.images]


def sample_from_record(
    record: Any,
    fallback_name: str,
    find_file: Callable[[str], LazyImage],
    find_embedded: Callable[[int], LazyImage] | None = None,
) -> Sample:
    """Return the sample of a record, or raise BadSample.

    Images without a tag in the text are put before the first human turn's text: a single one, and
    several in the dialects that have no tags.

    Args:
        record: The record, in any dialect.
        fallback_name: The sample's id where the record has none.
        find_file: Returns the image of a name.
        find_embedded: Returns the image that is number N (from 0) of the record and is in the
            record itself; None where records cannot hold images.
    """
    partial = _parse_record(record, fallback_name, find_embedded is not None)
    images = tuple(
        find_embedded(number) if find_embedded and image.is_embedded else find_file(image.value)
        for number, image in enumerate(partial.images)
    )
    has_tag = any(IMAGE_PLACEHOLDER in turn.text for turn in partial.turns)
    is_untagged = bool(images) and not has_tag
    turns = partial.turns
    if is_untagged and (len(images) == 1 or partial.are_images_first):
        turns = _insert_image_tags(turns, len(images))
    sample = Sample(
        partial.name,
        tuple(turns),
        images,
        _detect_language(turns),
        unread_keys=tuple(dict.fromkeys(partial.unread_keys)),
        is_untagged=is_untagged and len(images) == 1,
    )
    check_sample(sample)
    return sample


def list_written_images(record: Any) -> list[WrittenImage]:
    """Return the images of a record as they are written there."""
    return _parse_record(record, "record", may_embed=True).images


def _parse_record(record: Any, fallback_name: str, may_embed: bool) -> _PartialRecord:
    """Read turns, images and unread keys of a record."""
    try:
        return _read_record(record, fallback_name, may_embed)
    except RecursionError:
        raise BadSample(fallback_name, "its lists or mappings are nested too deeply") from None


def _read_record(record: Any, fallback_name: str, may_embed: bool) -> _PartialRecord:
    if not isinstance(record, dict):
        raise BadSample(fallback_name, f"is {describe_json_type(record)}; expected a mapping")
    name = _record_name(record, fallback_name)
    unified = unify_record(record)
    if problem := row_problem(unified):
        raise BadSample(name, problem)
    given, record = record, unified.record
    turns_key = _turns_key(name, record)
    partial = _PartialRecord(
        name, may_embed, are_images_first=unified.are_images_first, own_keys=unified.own_keys
    )
    partial.images = _listed_images(partial, record)
    listed_images = len(partial.images)
    for number, turn in enumerate(record[turns_key], start=1):
        _add_turn(partial, turn, number)
    if 0 < listed_images < len(partial.images):
        raise BadSample(
            name, f"has images in 'image' and in parts of {turns_key!r}; expected one way"
        )
    partial.unread_keys[:0] = find_unread_keys(name, record, USED_KEYS, partial.image_names)
    _refuse_missing_image(partial, record)
    _add_system_turn(partial, record.get("system"))
    refuse_media_tags(name, partial.turns)
    refuse_box_tags(name, partial.turns, record)
    refuse_hidden_options(name, partial.turns, record)
    refuse_preferences(name, partial.turns, given)
    return partial


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


def _turns_key(name: str, record: Mapping[str, Any]) -> str:
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


def _listed_images(partial: _PartialRecord, record: Mapping[str, Any]) -> list[WrittenImage]:
    """Return the images of a record: one, or a list; null, "" and lists of them are none."""
    images: list[WrittenImage] = []
    for key in IMAGE_KEYS:
        value = record.get(key)
        values = value if isinstance(value, list) else [value]
        listed = [read_written_image(one) for one in values]
        listed = [] if all(one.value in EMPTY_VALUES for one in listed) else listed
        own_key = repr(partial.own_keys.get(key, key))
        for number, image in enumerate(listed, start=1):
            place = f"entry {number} of {own_key}" if isinstance(value, list) else own_key
            _check_image(partial, image, place)
        if images and listed and listed != images:
            raise BadSample(
                partial.name, "has other images in 'image' than in 'images'; expected one"
            )
        images = listed or images
    return images


def _check_image(partial: _PartialRecord, image: WrittenImage, place: str) -> None:
    """Raise BadSample for what is no file name and no image; it stands at `place`."""
    value = image.value
    if image.is_embedded:
        problem = "" if partial.may_embed else _EMBEDDED_REMEDY
    elif not isinstance(value, str) or not value.strip() or "\0" in value:
        problem = "; expected a file name, an image, or a list of these"
    elif len(value) > MAX_PATH_LENGTH:
        problem = _EMBEDDED_REMEDY
    else:
        is_url = URL_PREFIX.match(value)
        problem = ", a URL; download it into data.images and give its name" if is_url else ""
    if problem:
        raise BadSample(partial.name, f"{place} is {describe_json_type(value)}{problem}")


def _add_turn(partial: _PartialRecord, turn: Any, number: int) -> None:
    """Read a turn: its role and text, and images that are parts of its content."""

    def refuse_turn(reason: str) -> BadSample:
        return BadSample(partial.name, f"turn {number}: {reason}")

    if not isinstance(turn, dict):
        raise refuse_turn(
            f"is {describe_json_type(turn)}; expected a mapping with 'from' and 'value'"
        )
    role_key = "role" if "role" in turn and "from" not in turn else "from"
    text_keys = TEXT_KEYS[role_key]
    text_key = next((key for key in text_keys if key in turn), text_keys[0])
    for key in (role_key, text_key):
        if key not in turn:
            raise refuse_turn(
                f"has no {key!r}; its keys are {', '.join(map(repr, turn)) or 'none'}"
            )
    role = _parse_role(turn[role_key], role_key, refuse_turn)
    own_key = partial.own_keys.get(turn[role_key], "")
    text = _parse_turn_text(partial, turn[text_key], own_key or text_key, refuse_turn)
    if not text.strip():
        raise refuse_turn(
            f"the text of {own_key or turn[role_key]!r} is empty; leave out the turn or the record"
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
        parts = read_content_parts(partial.name, content, partial.placeholder_parts, refuse_turn)
        for image in parts.images:
            _check_image(partial, image, "an image of 'content'")
        partial.images += parts.images
        partial.placeholder_parts += parts.listed_images
        partial.unread_keys += parts.unread_keys
        return parts.join_texts()
    if not isinstance(content, str):
        raise refuse_turn(f"{key!r} is {describe_json_type(content)}; expected a text")
    return content


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


def _refuse_missing_image(partial: _PartialRecord, record: Mapping[str, Any]) -> None:
    """Raise BadSample for a record of text that names an image by its id alone."""
    key = "" if partial.images else image_id_key(record)
    if key:
        raise BadSample(
            partial.name,
            f"{key!r} is {describe_json_type(record[key])}, and the record has no image; name its "
            "file in 'image'",
        )


def _insert_image_tags(turns: list[ChatTurn], count: int) -> list[ChatTurn]:
    """Put the tags of all images before the first human text."""
    first = next((n for n, turn in enumerate(turns) if turn.role == "human"), None)
    if first is None:
        return turns
    tagged = ChatTurn("human", f"{IMAGE_PLACEHOLDER * count}\n{turns[first].text}")
    return [*turns[:first], tagged, *turns[first + 1 :]]


def _detect_language(turns: list[ChatTurn]) -> str:
    """Return "zh" when a turn holds Chinese characters, otherwise "en"."""
    texts = (turn.text for turn in turns if not turn.text.isascii())
    return "zh" if any(map(CHINESE_CHARACTER.search, texts)) else "en"
