"""The size of an image in pixels, from the header of its file. Imports no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

from vlbench.data.image_decoding import check_beginning, open_image_file, read_header_size
from vlbench.data.sample import LazyImage
from vlbench.data.square_images import open_whole
from vlbench.errors import UserError

HEADER_BYTES = 65536  # of a file, in which the size is found unless a thumbnail comes before it


def read_image_size(image: LazyImage, exif: bool = False) -> tuple[int, int]:
    """Return width and height in pixels that an image has once it is opened.

    With `exif` they are those of the image turned as its EXIF orientation says. An image with a
    method `read_size` is asked; any other is opened. Raises a UserError that names the image.
    """
    read_size = getattr(image, "read_size", None)
    if read_size is not None:
        size: tuple[int, int] = read_size(exif)
        return size
    return open_whole(image, exif).size


def file_image_size(path: str | Path, exif: bool) -> tuple[int, int]:
    """Return the size of the image in a file; a UserError names one that cannot be read."""
    with open_image_file(path) as file:
        return read_header_size(file, f"image {path}", exif)


def bytes_image_size(data: bytes, name: str, exif: bool) -> tuple[int, int]:
    """Return the size of the image whose file has these bytes; errors call it `name`."""
    check_beginning(data, name)
    return read_header_size(BytesIO(data), name, exif)


def partial_image_size(
    read_bytes: Callable[[int | None], bytes], name: str, exif: bool
) -> tuple[int, int]:
    """Return the size of an image from the first bytes of its file, where they tell it.

    What is behind them may be megabytes, or far away. `read_bytes` returns at most as many bytes as
    it is given; all of them for None.
    """
    beginning = read_bytes(HEADER_BYTES)
    if len(beginning) == HEADER_BYTES:
        with contextlib.suppress(UserError):  # a longer header; what is wrong is told below
            return bytes_image_size(beginning, name, exif)
        beginning = read_bytes(None)
    return bytes_image_size(beginning, name, exif)
