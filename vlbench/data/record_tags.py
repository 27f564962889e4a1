"""Tags of other programs in texts, which stand for an image, a video or a box. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlbench.data.record_keys import EMPTY_VALUES
from vlbench.data.sample import IMAGE_PLACEHOLDER, ChatTurn
from vlbench.errors import BadSample

IMAGE_TAG = "<image>"  # LLaVA's spelling of IMAGE_PLACEHOLDER
IMAGE_PATH_TAG = re.compile(r"<img>.*?</img>", re.IGNORECASE | re.DOTALL)
MEDIA_TAG = re.compile(
    IMAGE_PATH_TAG.pattern + r"|</image>|!\[[^\]]*\]\(data:[^)\s]*"
    r"|<\|?\s*((start|end)_of_)?(image|img|video|audio|vision(?=_))"
    r"([ _-]?(pad|start|end|here|context|placeholder|token|soft_token|bos|eos|\d+))*\s*/?\|?>",
    re.IGNORECASE | re.DOTALL,
)
"""Tags of other programs for images, videos and sound; `<image>` is replaced before."""

BOX_KEYS = ("objects", "bbox", "bboxes", "boxes")
BOX_TAG = re.compile(r"<(bbox|ref-object|cls-object|mask|region)\d*>")
"""What stands in a text for an entry of one of BOX_KEYS."""


def refuse_media_tags(name: str, turns: Sequence[ChatTurn]) -> None:
    """Raise BadSample for a tag that means an image or a video and would be read as text."""
    for number, turn in enumerate(turns, start=1):
        where = f"a turn of {turn.role!r}"
        if turn.role == "system" and (IMAGE_TAG in turn.text or IMAGE_PLACEHOLDER in turn.text):
            raise BadSample(name, f"{IMAGE_TAG} in {where}; only 'human' may show images")
        pattern = IMAGE_PATH_TAG if turn.role == "assistant" else MEDIA_TAG
        match = pattern.search(turn.text.replace(IMAGE_PLACEHOLDER, ""))
        if not match:
            continue
        tag = match[0]
        if re.search("video|audio", tag, re.IGNORECASE):
            remedy = "videos and sound are not read: leave the record out, or show frames"
        else:
            remedy = f"name the file in 'image' and write {IMAGE_TAG} where the image belongs"
        raise BadSample(name, f"turn {number}: {tag!r} shows nothing here; {remedy}")


def refuse_box_tags(name: str, turns: Sequence[ChatTurn], record: Mapping[str, Any]) -> None:
    """Raise BadSample for a tag that stands for a box of the record, as ms-swift writes them."""
    key = next((key for key in BOX_KEYS if record.get(key) not in EMPTY_VALUES), "")
    for number, turn in enumerate(turns if key else (), start=1):
        match = BOX_TAG.search(turn.text)
        if match and f"</{match[1]}>" not in turn.text:
            raise BadSample(
                name,
                f"turn {number}: {match[0]!r} stands for an entry of {key!r}, which is not read; "
                "write it as text",
            )
