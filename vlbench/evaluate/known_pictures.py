"""Which images show the same picture, by their pixels, and which questions are the same.

Records of a table or of shards bring copies of a picture, one for each question about it, under
names of their own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from vlbench.data.sample import LazyImage, Sample


class KnownPictures:
    """The pictures that were met so far."""

    def __init__(self) -> None:
        """Know none."""
        self._first: dict[str, LazyImage] = {}
        self._digests: dict[LazyImage, str] = {}

    def unite(self, image: LazyImage) -> LazyImage:
        """Return the first image that shows the same picture; a UserError if it cannot be read."""
        if image not in self._digests:
            opened = image.open()
            digest = hashlib.sha256(f"{opened.size}".encode())
            digest.update(opened.tobytes())
            self._digests[image] = digest.hexdigest()
        return self._first.setdefault(self._digests[image], image)

    def digest(self, image: LazyImage) -> str:
        """Return the SHA-256 of the pixels of an image that `unite` was given."""
        return self._digests[image]


def checksum_question(question: Sample, image_digests: Iterable[str]) -> str:
    """Return a checksum of a conversation's turns and of what stands for its images."""
    turns = [[turn.role, turn.text] for turn in question.turns]
    text = json.dumps([turns, list(image_digests)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
