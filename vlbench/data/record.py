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

from vlbench.data.record_keys import DATA_URI, NOTHING, URL, unread
from vlbench.data.sample import PLACEHOLDER, Picture, Sample, Turn, check
from vlbench.mistakes import BadSample, kind_of, nearest, printable

ROLES = {
    "human": "human",
    "user": "human",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""Capital letters are read as small ones."""
TURNS = ("conversations", "messages")
IMAGES = ("image", "images")
USED = ("id", "system", *TURNS, *IMAGES)
TAG = "<image>"  # LLaVA's spelling of PLACEHOLDER
SHAPE = (
    '"conversations": [{"from": "human", "value": "<image>\\nQuestion"}, '
    '{"from": "gpt", "value": "Answer"}]'
)

UNLEARNED = ("loss", "loss_mask", "loss_scale", "train", "trainable", "weight")
"""Keys of a turn by which other programs leave an answer out of the loss, when false or 0."""

PATH_TAG = re.compile(r"<img>.*?</img>", re.IGNORECASE | re.DOTALL)
MEDIA_TAG = re.compile(
    PATH_TAG.pattern + r"|</image>|!\[[^\]]*\]\(data:[^)\s]*"
    r"|<\|?\s*((start|end)_of_)?(image|img|video|audio|vision(?=_))"
    r"([ _-]?(pad|start|end|here|context|placeholder|token|soft_token|bos|eos|\d+))*\s*/?\|?>",
    re.IGNORECASE | re.DOTALL,
)
"""Tags with which other programs show pictures, videos and sound; `<image>` is replaced before."""


BASE64 = re.compile(r"[A-Za-z0-9+/=\s]{200,}")  # a path of that length has other characters
"""The bytes of a picture as text; paths are at most 4096 characters long."""


@dataclass
class _Read:
    """What was read of a record by now."""

    name: str
    turns: list[Turn]
    images: list[str]
    unread: list[str]


def sample_of_record(record: Any, name: str, picture_of: Callable[[str], Picture]) -> Sample:
    """Return the sample of a record, or raise BadSample.

    `name` is what it is called where it has no id, `picture_of` gives the picture of an image name.
    A single picture without a tag in the text comes first in the first human turn.
    """
    if not isinstance(record, dict):
        raise BadSample(name, f"is {kind_of(record)}; expected a mapping")
    own = record.get("id")
    if isinstance(own, str | int | float) and not isinstance(own, bool) and str(own).strip():
        name = printable(str(own))
    key = _turns_key(name, record)
    read = _Read(name, [], _images(name, record), [])
    given = len(read.images)
    for number, turn in enumerate(record[key], start=1):
        _add_turn(read, turn, number)
    if 0 < given < len(read.images):
        raise BadSample(name, f"has pictures in 'image' and in parts of {key!r}; expected one way")
    read.unread[:0] = unread(name, record, USED, read.images)
    _add_system(read, record.get("system"))
    pictures = tuple(picture_of(image) for image in read.images)
    untagged = bool(pictures) and not any(PLACEHOLDER in turn.text for turn in read.turns)
    _no_media_tags(read)
    turns = _with_tag(read.turns) if untagged and len(pictures) == 1 else read.turns
    sample = Sample(
        name,
        tuple(turns),
        pictures,
        _language(turns),
        unread=tuple(dict.fromkeys(read.unread)),
        untagged=untagged,
    )
    check(sample)
    return sample


def record_of_sample(sample: Sample, images: list[str]) -> dict[str, Any]:
    """Return the record that is read as `sample`, its pictures called `images`."""
    names = {"human": "human", "assistant": "gpt", "system": "system"}
    turns = [{"from": names[turn.role], "value": turn.text} for turn in sample.turns]
    return {"id": sample.id, **({"image": images} if images else {}), "conversations": turns}


def _turns_key(name: str, record: dict[str, Any]) -> str:
    """Return the key under which the turns are."""
    given = [key for key in TURNS if record.get(key) is not None]
    given = [key for key in given if record[key] not in NOTHING] or given[:1]
    if len(given) > 1:
        raise BadSample(name, "has 'conversations' and 'messages'; expected one of them")
    key = given[0] if given else TURNS[0]
    if key not in record:
        keys = ", ".join(repr(key) for key in list(record)[:10]) or "none"
        near = next((one for key in record if (one := nearest(str(key), TURNS[:1]))), "")
        raise BadSample(name, f"has no {key!r}; its keys are {keys}; expected {SHAPE}.{near}")
    if not isinstance(record[key], list):
        raise BadSample(name, f"{key!r} is {kind_of(record[key])}; expected a list of turns")
    if not record[key]:
        raise BadSample(name, "the conversation is empty")
    return key


def _images(name: str, record: dict[str, Any]) -> list[str]:
    """Return the image names of a record: a text, a list of texts, null or absent."""
    found: list[str] = []
    for key in IMAGES:
        value = record.get(key)
        images = [] if value is None else value if isinstance(value, list) else [value]
        for image in images:
            _check_name(name, image, f"{key!r} is {kind_of(value)}")
        if found and images and images != found:
            raise BadSample(name, "has other pictures in 'image' than in 'images'; expected one")
        found = images or found
    return found


def _check_name(name: str, image: Any, what: str) -> None:
    """Raise BadSample for what is no name of a file; `what` tells what was given."""
    if not isinstance(image, str) or not image.strip() or "\0" in image:
        raise BadSample(name, f"{what}; expected a file name or a list")
    if DATA_URI.match(image[:20]) or BASE64.fullmatch(image) or len(image) > 4096:
        raise BadSample(name, f"{what}, a picture as text; write it to a file and give its name")
    if URL.match(image):
        raise BadSample(name, f"{what}, a URL; download it into data.images and give its name")


def _add_turn(read: _Read, turn: Any, number: int) -> None:
    """Read a turn: its role and text, and pictures that are parts of it."""

    def refuse(reason: str) -> BadSample:
        return BadSample(read.name, f"turn {number}: {reason}")

    if not isinstance(turn, dict):
        raise refuse(f"is {kind_of(turn)}; expected a mapping with 'from' and 'value'")
    used = ("role", "content") if "role" in turn and "from" not in turn else ("from", "value")
    for key in used:
        if key not in turn:
            raise refuse(f"has no {key!r}; its keys are {', '.join(map(repr, turn)) or 'none'}")
    role = _role(turn[used[0]], used[0], refuse)
    text = _text(read, turn[used[1]], used[1], refuse)
    if not text.strip():
        raise refuse(f"the text of {turn[used[0]]!r} is empty; leave out the turn or the record")
    off = next((key for key in UNLEARNED if turn.get(key) in (False, 0)), "")
    if off and role == "assistant":
        raise refuse(f"{off!r} is {turn[off]!r}; every answer is learned, so leave out the turn")
    text = text.replace(TAG, PLACEHOLDER) if role == "human" else text
    keys = unread(read.name, turn, used, read.images, f"turn {number}: ")
    read.unread += [f"turn {key}" for key in keys]
    read.turns.append(Turn(role, text))


def _role(who: Any, key: str, refuse: Callable[[str], BadSample]) -> str:
    if not isinstance(who, str):
        raise refuse(f"{key!r} is {kind_of(who)}; expected a text")
    role = ROLES.get(who.strip().lower())
    if role is None:
        raise refuse(f"unknown role {who!r}; known: {', '.join(ROLES)}.{nearest(who, list(ROLES))}")
    return role


def _text(read: _Read, said: Any, key: str, refuse: Callable[[str], BadSample]) -> str:
    if key == "content" and isinstance(said, list):
        return _of_parts(read, said, refuse)
    if not isinstance(said, str):
        raise refuse(f"{key!r} is {kind_of(said)}; expected a text")
    return said


def _of_parts(read: _Read, parts: list[Any], refuse: Callable[[str], BadSample]) -> str:
    """Return the text of a content in parts, as of transformers' chat format; add its pictures.

    Between a picture and a text stands a newline, between two pictures nothing.
    """
    texts: list[str] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        value = part.get(kind, part.get("path")) if kind in ("text", "image") else None
        if kind is None or not isinstance(value, str):
            raise refuse(
                f"a part of 'content' is {kind_of(part)}; expected "
                '{"type": "text", "text": TEXT} or {"type": "image", "image": FILE}'
            )
        _note_keys(read, part, kind, value, refuse)
        if kind == "image":
            _check_name(read.name, value, f"a picture of 'content' is {kind_of(value)}")
            read.images.append(value)
        if texts and not (kind == "image" and texts[-1] == PLACEHOLDER):
            texts.append("\n")
        texts.append(PLACEHOLDER if kind == "image" else value)
    return "".join(texts)


def _note_keys(
    read: _Read, part: dict[str, Any], kind: str, value: str, refuse: Callable[[str], BadSample]
) -> None:
    """Note the keys of a part of a content that are not read; refuse those with content."""
    used = ("type", kind if kind in part else "path")
    try:
        keys = unread(read.name, part, used, [value])
    except BadSample as bad:
        raise refuse(f"in a part of 'content' {bad.reason}") from bad
    read.unread += [f"turn {key}" for key in keys]


def _add_system(read: _Read, system: Any) -> None:
    """Put the system prompt of a record before its turns."""
    if system is None or system == "":
        return
    if not isinstance(system, str) or not system.strip():
        raise BadSample(read.name, f"'system' is {kind_of(system)}; expected a text")
    first = read.turns[0]
    if first.role == "system" and first.text != system:
        raise BadSample(read.name, "has a key 'system' and another system turn; expected one")
    if first.role != "system":
        read.turns.insert(0, Turn("system", system))


def _no_media_tags(read: _Read) -> None:
    """Raise BadSample for a tag that would be read as text where a picture or a video was meant."""
    for number, turn in enumerate(read.turns, start=1):
        where = f"a turn of {turn.role!r}"
        if turn.role == "system" and (TAG in turn.text or PLACEHOLDER in turn.text):
            raise BadSample(read.name, f"{TAG} in {where}; only 'human' may show images")
        tags = PATH_TAG if turn.role == "assistant" else MEDIA_TAG
        found = tags.search(turn.text.replace(PLACEHOLDER, ""))
        if not found:
            continue
        tag = found[0]
        if re.search("video|audio", tag, re.IGNORECASE):
            todo = "videos and sound are not read: leave the record out, or show frames"
        else:
            todo = f"name the file in 'image' and write {TAG} where the picture stands"
        raise BadSample(read.name, f"turn {number}: {tag!r} shows nothing here; {todo}")


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
