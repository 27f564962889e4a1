"""Keys of a record that its reader does not use: which are counted, and which lose content.

A reader says which keys it uses. Every other key with a value is reported: `unread` returns its
name, for `fit` and `check` to count, or raises BadSample when the key would be training content
(a picture, a video, sound, a system prompt, tools, earlier turns). Imports no torch.
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
"""Keys that public data sets carry and nothing is learned from."""

CONTENT_KINDS = {
    "picture": (
        "image img picture pic photo pixel screenshot thumbnail jpg jpeg png visual frame media",
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
"""By kind of content: the words that a key of it has, and what to do with the record."""

METADATA_WORDS = frozenset(
    "aspect category count dataset duration end format fps hash height id idx index length license "
    "md5 num number quality ratio res resolution score sha sha1 sha256 similarity size source "
    "split start tag type version width".split()
)
"""With one of these words in it, a key tells about a picture (`image_id`, `num_images`)."""

TEXT_WORDS = frozenset(
    "answer caption description input instruction label output prompt question response text "
    "title".split()
)
"""With one of these words in it, a key holds text, also where a picture is named (`image_text`)."""

ADDRESS_WORDS = frozenset("href link source src uri url".split())
"""Words of a key that says where a picture came from."""

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
    """Return the keys of `record` that have a value and are not in `used`.

    Raises BadSample, called `name`, when such a key or its value looks like training content. The
    address or another path of one of the `pictures` that are read is none. `where` is put before a
    key in messages, as "turn 2: ".
    """
    found = []
    for key, value in record.items():
        if key in used_keys or _is_empty(value):
            continue
        kind = _content_kind(str(key), value)
        if kind and not (kind == "picture" and _is_known_image(str(key), value, image_names)):
            raise BadSample(
                name, f"{message_prefix}{str(key)!r} is not read; {CONTENT_KINDS[kind][1]}"
            )
        found.append(str(key))
    return tuple(found)


def _is_empty(value: Any) -> bool:
    """Tell whether a value is empty, or a list or mapping of what is empty."""
    if value in EMPTY_VALUES:
        return True
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(inner) and all(map(_is_empty, inner))


def is_metadata_key(key: str) -> bool:
    """Tell whether a key of `Sample.unread` is one of those from which nothing is learned."""
    key = key.removeprefix("turn ")
    words = _key_words(key)
    return key.lower() in METADATA_KEYS or bool(METADATA_WORDS & words and not TEXT_WORDS & words)


def _content_kind(key: str, value: Any) -> str:
    """Return the kind of content that a key holds, "" for none."""
    by_value = next((kind for text in _iterate_texts(value) if (kind := _media_kind(text))), "")
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
    """Return the words of a key in small letters, without the s of a plural and final digits."""
    words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+[0-9]*|[A-Z]+(?![a-z])[0-9]*", key)}
    bare = {word.rstrip("0123456789") for word in words}
    return frozenset(words | bare | {word.removesuffix("s") for word in bare})


def _iterate_texts(value: Any) -> Iterator[str]:
    """Give the texts in a value: itself, those of a list, those of mappings in it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        inner = value.values() if isinstance(value, dict) else value
        for one in inner:
            yield from _iterate_texts(one)


def _media_kind(text: str) -> str:
    found = DATA_URI.match(text[:20])
    if found:
        return {"image": "picture", "video": "video", "audio": "sound"}[found[1]]
    named = MEDIA_FILE.fullmatch(text.partition("?")[0]) if len(text) < 1000 else None
    if not named:
        return ""
    return "video" if named[2] else "sound" if named[3] else "picture"


def _is_known_image(key: str, value: Any, image_names: Collection[str]) -> bool:
    """Tell whether a value is where pictures that are read come from, or another path of them."""
    names = {PurePosixPath(picture).name for picture in image_names}
    told = bool(ADDRESS_WORDS & _key_words(key) and names)
    texts = list(_iterate_texts(value))
    return bool(texts) and all(
        (told and URL_PREFIX.match(text)) or PurePosixPath(text).name in names for text in texts
    )
