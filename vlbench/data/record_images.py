"""Images of a record: names of files, or their bytes inside of the record. Imports no torch.

A record holds the bytes as such (a column of a Parquet file), in a mapping of `bytes` and `path`
(as the Hugging Face libraries write images), or as text in base64 (OpenAI's `image_url`).
"""

from __future__ import annotations

import base64
import re
import urllib.parse
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from vlbench.data.image_processing import open_image_bytes
from vlbench.data.image_size import partial_image_size
from vlbench.data.record_keys import STRUCT_KEYS, is_metadata_key
from vlbench.errors import BadSample, UserError

BASE64_TEXT = re.compile(r"[A-Za-z0-9+/=\s]{200,}")  # a path of that length has other characters
"""The bytes of an image as base64 text, or how they begin."""
MAX_PATH_LENGTH = 4096  # characters, as on Linux
FILE_URL = re.compile(r"file://(localhost)?(?=/)")
DATA_PREFIX = "data:"
OMITTED_BYTES = b"omitted"
"""In place of an image's bytes, in a record that was read without them."""


class HoldsImages(Protocol):
    """A source whose records hold images."""

    name: str

    def read_image(self, index: int, number: int, most: int | None = None) -> bytes:
        """Return the file of image `number` (from 0) of record `index`, or raise a UserError.

        Of its bytes no more than the first `most` are needed, if that is given.
        """
        ...


@dataclass(frozen=True)
class EmbeddedImage:
    """An image inside of a record, which is read again when the image is opened."""

    source: HoldsImages
    record_index: int
    image_index: int
    """Among the images of the record, from 0."""

    @property
    def name(self) -> str:
        """The source, and the image's place there."""
        number = f", image {self.image_index + 1}" if self.image_index else ""
        return f"{self.source.name}: record {self.record_index + 1}{number}"

    def open(self) -> Image.Image:
        """Return it in RGB, or raise a UserError with the name."""
        return open_image_bytes(self.read_bytes(), f"image of {self.name}")

    def open_draft(self, draft_side: int) -> Image.Image:
        """Return it in RGB; a JPEG may be downscaled to a longest edge >= `draft_side`."""
        return open_image_bytes(self.read_bytes(), f"image of {self.name}", draft_side)

    def read_size(self, exif: bool) -> tuple[int, int]:
        """Return width and height in pixels from the header of the image's file."""
        return partial_image_size(self.read_bytes, f"image of {self.name}", exif)

    def read_bytes(self, most: int | None = None) -> bytes:
        """Return the bytes of the image's file, the first `most` of them if that is given.

        A UserError names what cannot be read.
        """
        try:
            return self.source.read_image(self.record_index, self.image_index, most)
        except BadSample as bad:
            raise UserError(f"image of {self.name}: {bad.reason}") from bad


@dataclass(frozen=True)
class WrittenImage:
    """An image as it is written in a record: the name of a file, or the bytes."""

    value: Any
    """A text, bytes, a mapping that has bytes, or what is no image."""
    is_embedded: bool
    """Whether its bytes are there."""

    @property
    def file_name(self) -> str:
        """The name of its file, "" where there are bytes without one."""
        if self.is_embedded and not isinstance(self.value, dict):
            return ""
        name = self.value.get("path") if isinstance(self.value, dict) else self.value
        return name if isinstance(name, str) else ""


def read_written_image(value: Any) -> WrittenImage:
    """Tell what an image of a record is; a mapping of a path without bytes is that path."""
    if isinstance(value, dict) and STRUCT_KEYS & value.keys():
        others = value.keys() - STRUCT_KEYS
        if all(value[key] is None or is_metadata_key(str(key)) for key in others):
            has_bytes = value.get("bytes") is not None
            return WrittenImage(value if has_bytes else _local_name(value.get("path")), has_bytes)
    if isinstance(value, str):  # of bytes as text the beginning tells enough
        is_data_url = value.startswith(DATA_PREFIX)
        is_text = is_data_url or BASE64_TEXT.fullmatch(value[:MAX_PATH_LENGTH])
        return WrittenImage(value if is_text else _local_name(value), bool(is_text))
    return WrittenImage(value, isinstance(value, bytes))


def _local_name(name: Any) -> Any:
    """Return the path that a `file://` address names, as Qwen-VL's data have; else the name."""
    match = FILE_URL.match(name) if isinstance(name, str) else None
    return urllib.parse.unquote(name[match.end() :]) if match else name


def image_bytes(image: WrittenImage, most: int | None = None) -> bytes:
    """Return the bytes of an embedded image, the first `most` of them if that is given.

    BadSample where the text is no base64.
    """
    value = image.value["bytes"] if isinstance(image.value, dict) else image.value
    if isinstance(value, bytes):
        return value[:most]
    text = str(value)
    if text.startswith(DATA_PREFIX):
        header, comma, text = text.partition(",")
        if not comma or not header.endswith(";base64"):
            raise BadSample("", f"is a data URL without base64 ({header[:40]})")
    digits = "".join(text.split())
    if most is not None:
        digits = digits[: -(-most // 3) * 4]  # 3 bytes are 4 digits
    try:
        return base64.b64decode(digits, validate=True)[:most]
    except ValueError as error:  # binascii.Error is one; characters beyond ASCII raise a plain one
        raise BadSample("", f"is no base64 text ({error})") from error
