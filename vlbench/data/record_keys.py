"""Unread keys of a record: metadata is counted, training content is refused.

A reader passes the keys that it uses. `find_unread_keys` returns every other key with a value, for
`fit` and `check` to count, or raises BadSample when the key would be training content (an image, a
video, sound, a system prompt, tools, earlier turns). Imports no torch.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from vlbench.errors import BadSample

METADATA_KEYS = frozenset(
    "annotator aspect_ratio author category clip_score coco_url copyright created created_at "
    "data_source data_type dataset dataset_name date difficulty domain error_message exif "
    "file_size flickr_url hash height height_list id idx index key lang language license md5 meta "
    "metadata model nsfw num_turns original_height original_width origin phash punsafe pwatermark "
    "quality question_id score sha1 sha256 similarity size source split status subset tag tags "
    "task task_type topic type uid unique_id url uuid version width width_list".split()
)
"""Keys of public data sets that are metadata."""

CONTENT_KINDS = {
    "image": (
        "image img picture pic photo pixel screenshot thumbnail jpg jpeg png webp visual frame "
        "media",
        "name the file in 'image' of the record (one or a list), and write <image> in a human turn "
        "where it stands",
    ),
    "video": (
        "video vid mp4 movie clip",
        "videos are not read: leave the record out, or list frames in 'image'",
    ),
    "sound": (
        "audio speech sound voice wav mp3 waveform",
        "sound is not read: leave the record out",
    ),
    "system": ("system", "write the system prompt as 'system' or as the first turn"),
    "tools": (
        "tool function",
        "tools are not read: describe them in the system turn, or leave the record out",
    ),
    "history": ("history", "earlier turns are not read: put them into 'conversations'"),
}
"""By kind of content: the words that its keys contain, and what to do with the record."""

METADATA_WORDS = frozenset(
    "aspect category confidence count dataset duration end format fps hash height id idx index "
    "length license max md5 mean min num number quality rating ratio res resolution score sha sha1 "
    "sha256 similarity size source split start std tag type version width".split()
)
"""A key with one of these words is metadata, also of an image (`image_id`, `num_images`)."""

TEXT_WORDS = frozenset(
    "answer caption description input instruction label output prompt question response text "
    "title".split()
)
"""A key with one of these words is text, also if it names an image (`image_text`)."""

IMAGE_NAME_WORDS = frozenset("image img picture pic photo".split())
"""A key with one of these words and `id` names an image (`image_id`)."""

STRUCT_KEYS = frozenset({"bytes", "path"})
"""What a mapping that is an image has; either may be null. Its other keys are metadata."""

IMAGE_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")
"""How files of images begin."""

ADDRESS_WORDS = frozenset("href link source src uri url".split())
"""Words of a key that says where an image came from."""

PATH_WORDS = frozenset("file filename filepath href link name path uri url".split())
"""Words of a key with another path of an image; not `source`: that of an edit is another image."""

MEDIA_FILE = re.compile(
    r"\S+\.(jpe?g|png|webp|gif|bmp|tiff?|ppm|jp2|avif|heic|"
    r"(mp4|avi|mov|mkv|webm|m4v)|(mp3|wav|flac|ogg|m4a))",
    re.IGNORECASE,
)
DATA_URI = re.compile(r"data:(image|video|audio)/")
URL_PREFIX = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
EMPTY_VALUES: tuple[Any, ...] = (None, "", [], {})


def find_unread_keys(
    name: str,
    record: Mapping[str, Any],
    used_keys: Collection[str],
    image_names: Collection[str] = (),
    message_prefix: str = "",
) -> tuple[str, ...]:
    """Return the keys of `record` that have a value and are not in `used_keys`.

    Args:
        name: The name of the sample in an error.
        record: A record, a turn, or a part of a content.
        used_keys: Keys that the reader uses.
        image_names: Images that are read; the URL or another path of one of them is metadata, and
            the bytes of an image never are.
        message_prefix: What an error puts before the key, as "turn 2: ".

    Raises:
        BadSample: A key or its value looks like training content.
    """
    unread = []
    for key, value in record.items():
        if key in used_keys or _is_empty(value):
            continue
        kind = _content_kind(str(key), value)
        if kind and not (kind == "image" and _is_known_image(str(key), value, image_names)):
            raise BadSample(
                name, f"{message_prefix}{str(key)!r} is not read; {CONTENT_KINDS[kind][1]}"
            )
        unread.append(str(key))
    return tuple(unread)


def _is_empty(value: Any) -> bool:
    """Tell whether a value is empty, or a list or mapping of empty values."""
    if value in EMPTY_VALUES:
        return True
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(items) and all(map(_is_empty, items))


def is_metadata_key(key: str) -> bool:
    """Tell whether a key of `Sample.unread_keys` is metadata."""
    key = key.removeprefix("turn ")
    words = _key_words(key)
    return key.lower() in METADATA_KEYS or bool(METADATA_WORDS & words and not TEXT_WORDS & words)


def _content_kind(key: str, value: Any) -> str:
    """Return the kind of content that a key holds, "" for none."""
    texts = (text for _, text in _iterate_texts(key, value))
    by_value = next((kind for text in texts if (kind := media_kind(text))), "")
    by_value = by_value or ("image" if _holds_image_bytes(value) else "")
    words = _key_words(key)
    if by_value or METADATA_WORDS & words or key.lower() in METADATA_KEYS:
        return by_value
    if TEXT_WORDS & words:  # of `system_prompt`, not of `image_text`
        return "system" if "system" in words else ""
    if isinstance(value, bool | int | float):
        return ""
    return next(
        (kind for kind, (known, _) in CONTENT_KINDS.items() if words & set(known.split())), ""
    )


@functools.cache
def _key_words(key: str) -> frozenset[str]:
    """Return the words of a key in lower case, with and without a plural s and final digits."""
    words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+[0-9]*|[A-Z]+(?![a-z])[0-9]*", key)}
    without_digits = {word.rstrip("0123456789") for word in words}
    singular = {word.removesuffix("s") for word in without_digits}
    return frozenset(words | without_digits | singular)


def _iterate_texts(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield the texts in a value, itself or in nested lists and mappings, with their own keys.

    The path of a mapping that is an image has the key of the image.
    """
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            own_key = key if value.keys() <= STRUCT_KEYS else str(name)
            yield from _iterate_texts(own_key, item)
    elif isinstance(value, list):
        for item in value:
            yield from _iterate_texts(key, item)


def _holds_image_bytes(value: Any) -> bool:
    """Tell whether a value is the bytes of an image, or a mapping or a list that has some."""
    if isinstance(value, bytes):
        return value.startswith(IMAGE_SIGNATURES)
    if isinstance(value, dict):
        return isinstance(value.get("bytes"), bytes) and "path" in value
    return isinstance(value, list) and any(map(_holds_image_bytes, value))


def image_id_key(record: Mapping[str, Any]) -> str:
    """Return the key of a record that names an image by a number or a name, "" for none."""
    return next(
        (
            key
            for key, value in record.items()
            if isinstance(value, str | int)
            and value not in ("", -1)
            and "id" in (words := _key_words(str(key)))
            and IMAGE_NAME_WORDS & words
        ),
        "",
    )


def media_kind(text: str) -> str:
    """Return the kind of content of a data URI or a media file's name, "" for other texts."""
    data_uri = DATA_URI.match(text[:20])
    if data_uri:
        return {"image": "image", "video": "video", "audio": "sound"}[data_uri[1]]
    file_name = MEDIA_FILE.fullmatch(text.partition("?")[0]) if len(text) < 1000 else None
    if not file_name:
        return ""
    return "video" if file_name[2] else "sound" if file_name[3] else "image"


def _is_known_image(key: str, value: Any, image_names: Collection[str]) -> bool:
    """Tell whether a value is the URL of images that are read, or another path of them."""
    if _holds_image_bytes(value):  # not compared with those read: a plan of texts leaves them out
        return False
    texts = list(_iterate_texts(key, value))
    texts = [(name, text) for name, text in texts if media_kind(text)] or texts
    return bool(texts) and all(
        (image_names and ADDRESS_WORDS & _key_words(name) and URL_PREFIX.match(text))
        or any(_is_same_file(name, text, image_name) for image_name in image_names)
        for name, text in texts
    )


def _is_same_file(key: str, path: str, image_name: str) -> bool:
    """Tell whether the path that a key has is that of an image: written longer, shorter, or moved.

    In another folder an image of that name may be another one (`original/1.png` and
    `edited/1.png`), unless the key says that it holds a path.
    """
    parts, known = PurePosixPath(path).parts, PurePosixPath(image_name).parts
    shared = min(len(parts), len(known)) if PATH_WORDS.isdisjoint(_key_words(key)) else 1
    return shared > 0 and parts[-shared:] == known[-shared:]
