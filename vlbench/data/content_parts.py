"""The content of a message in parts: texts and images, of OpenAI and of transformers.

    {"type": "text", "text": TEXT}                       also input_text, output_text
    {"type": "image", "image": FILE}                     or path, url, base64
    {"type": "image"}                                    the next of the record's `images`
    {"type": "image_url", "image_url": {"url": FILE}}    also input_image, and a text for a mapping

Keys that are null are left out, as rows of Parquet files have all keys in every part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vlbench.data.record_dialects import IMAGE_KEYS, TURN_KEYS
from vlbench.data.record_images import WrittenImage, read_written_image
from vlbench.data.record_keys import EMPTY_VALUES, find_unread_keys
from vlbench.data.sample import IMAGE_PLACEHOLDER
from vlbench.errors import BadSample, describe_json_type

TEXT_TYPES = {"text": "text", "input_text": "text", "output_text": "text"}
IMAGE_TYPES = ("image", "image_url", "input_image")
IMAGE_VALUE_KEYS = ("image", "image_url", "path", "url", "base64")
"""Keys of a part that may hold its image."""
EXPECTED_PART = '{"type": "text", "text": TEXT} or {"type": "image", "image": FILE}'


def names_images(record: Mapping[str, Any]) -> bool:
    """Tell whether a record says what its images are, in a key or in parts of a turn."""
    turns = [turn for key in TURN_KEYS for turn in _mappings_in(record.get(key))]
    parts = [part for turn in turns for part in _mappings_in(turn.get("content"))]
    return any(record.get(key) not in EMPTY_VALUES for key in IMAGE_KEYS) or any(
        part.get(key) not in EMPTY_VALUES for part in parts for key in IMAGE_VALUE_KEYS
    )


def _mappings_in(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


@dataclass
class ContentParts:
    """What the parts of a content are."""

    texts: list[str] = field(default_factory=list)
    images: list[WrittenImage] = field(default_factory=list)
    listed_images: int = 0
    """Images that are not in the parts but in the record's own key."""
    unread_keys: list[str] = field(default_factory=list)

    def join_texts(self) -> str:
        """Return the text: an image and a text are joined by a newline, two images by nothing."""
        joined: list[str] = []
        for text in self.texts:
            if joined and not text == joined[-1] == IMAGE_PLACEHOLDER:
                joined.append("\n")
            joined.append(text)
        return "".join(joined)


def read_content_parts(
    name: str, parts: list[Any], first_listed: int, refuse_turn: Callable[[str], BadSample]
) -> ContentParts:
    """Read the parts of a content.

    Args:
        name: The name of the sample in an error.
        parts: The parts, mappings with a `type`.
        first_listed: How many of the record's own images earlier turns have taken.
        refuse_turn: Returns the error of the turn for a reason.
    """
    content = ContentParts()
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str):
            part, kind = {"text": part}, "text"
        if isinstance(kind, str) and kind in TEXT_TYPES:
            _add_text(content, name, part, refuse_turn)
        elif kind in IMAGE_TYPES:
            _add_image(content, name, part, first_listed, refuse_turn)
        else:
            raise _unknown_part(part, refuse_turn)
    return content


def _unknown_part(part: Any, refuse_turn: Callable[[str], BadSample]) -> BadSample:
    return refuse_turn(
        f"a part of 'content' is {describe_json_type(part)}; expected {EXPECTED_PART}"
    )


def _add_text(
    content: ContentParts,
    name: str,
    part: dict[str, Any],
    refuse_turn: Callable[[str], BadSample],
) -> None:
    if not isinstance(part.get("text"), str):
        raise _unknown_part(part, refuse_turn)
    _note_unread_keys(content, name, part, ("type", "text"), refuse_turn)
    content.texts.append(part["text"])


def _add_image(
    content: ContentParts,
    name: str,
    part: dict[str, Any],
    first_listed: int,
    refuse_turn: Callable[[str], BadSample],
) -> None:
    """Add an image that a part holds, or that it is the place of."""
    key = next((key for key in IMAGE_VALUE_KEYS if part.get(key) not in EMPTY_VALUES), "")
    value = part.get(key)
    if key == "image_url" and isinstance(value, dict):
        value = value.get("url")
    content.texts.append(IMAGE_PLACEHOLDER)
    if key:
        content.images.append(read_written_image(value))
    else:
        index, number = part.get("index"), first_listed + content.listed_images
        if type(index) is int and index != number:
            raise refuse_turn(
                f"a part of 'content' is image {index} of 'images', and {number} would be next; "
                "expected them in order"
            )
        content.listed_images += 1
    _note_unread_keys(content, name, part, ("type", key), refuse_turn)


def _note_unread_keys(
    content: ContentParts,
    name: str,
    part: dict[str, Any],
    used: tuple[str, ...],
    refuse_turn: Callable[[str], BadSample],
) -> None:
    """Record the keys of a part that are not read; refuse those with content."""
    try:
        keys = find_unread_keys(name, part, used, [one.file_name for one in content.images])
    except BadSample as bad:
        raise refuse_turn(f"in a part of 'content' {bad.reason}") from bad
    content.unread_keys += [f"turn {key}" for key in keys]
