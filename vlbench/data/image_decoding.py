"""Decoding an image in RGB, in a bounded amount of memory. Imports no torch.

A small file can hold a huge image, so its size in pixels is looked up in the header, and the memory
that its decoder needs for it is computed, before anything is decoded.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vlbench.data.image_folder import missing_message
from vlbench.errors import UserError, one_line
from vlbench.process_settings import ignore_thread_warnings
from vlbench.regular_files import MAX_IMAGE_BYTES, describe_failure, format_bytes, open_regular
from vlbench.text_files import LFS_POINTER

IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Formats that are decoded inside this process; others (EPS, PDF) would start programs."""
LFS_MESSAGE = "is a Git-LFS pointer and not the image; run git lfs pull"
MAX_PIXELS = 178_956_970  # PIL's own limit; larger images are refused
MAX_DECODING_BYTES = 850_000_000  # of memory for one image: a JPEG or PNG of MAX_PIXELS needs 716
DECODING_BYTES = {"WEBP": 17, "JPEG2000": 25, "AVIF": 13}
"""Bytes per pixel that decoders take at their peak, measured with pillow 13 and 36 megapixels."""
COEFFICIENT_BYTES = 2  # per pixel and channel of a progressive JPEG, which are all kept
RGB_BYTES = 4  # per pixel of an image of PIL in RGB
_MODE_BYTES = {"RGB": 0, "1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}
"""Bytes per pixel beside those of the result; 4 in the other modes."""
_STRIP_PIXELS = 1 << 20  # of 16-bit gray that are scaled at once
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
_TILE_WIDTH, _TILE_HEIGHT = 322, 323  # tags of a TIFF
_JPEG_2000_START, _JPEG_2000_END = b"\xff\x4f\xff\x51", b"\xff\xd9"
"""Markers of ISO/IEC 15444-1, A.2: how a codestream begins (SOC, SIZ), and its end (EOC)."""


def decode_rgb(
    source: BinaryIO | BytesIO, name: str, draft_side: int = 0, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Decode an image in RGB: of several frames the first, 16 bits scaled to 8, alpha dropped.

    With `draft_side` the decoder may downscale a JPEG, to a longest edge of at least that many
    pixels. An image of more than `max_pixels` is not decoded. Raises a UserError that calls the
    image `name`.
    """
    with open_header(source, name, max_pixels) as image:
        if draft_side:
            image.draft(None, _reduced_size(image.size, draft_side))
        if image.format == "JPEG2000":
            _check_codestream_end(source)
        return _convert_rgb(image)


def read_header_size(source: BinaryIO | BytesIO, name: str, exif: bool) -> tuple[int, int]:
    """Return the width and height that `decode_rgb` gives, with the header alone where it tells.

    With `exif` they are those of the image turned as its EXIF orientation says. Raises a UserError
    that calls the image `name`.
    """
    with open_header(source, name) as image:
        is_turned = (exif or image.format == "TIFF") and _read_orientation(image) in SIDEWAYS
        if is_turned and image.format == "TIFF":  # PIL turns it itself, in some versions
            return ImageOps.exif_transpose(image).size if exif else _convert_rgb(image).size
        width, height = image.size
        return (height, width) if is_turned else (width, height)


def _read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, 1 for none; a UserError if it cannot be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception as error:  # a parser of EXIF may raise anything on broken bytes
        raise UserError(explain_exif_failure(error)) from error


def explain_exif_failure(error: Exception) -> str:
    """Return why an image cannot be turned as its EXIF orientation says, and what helps."""
    reason = one_line(error, max_lines=1)
    return f"its EXIF cannot be read ({reason}); data.exif=ignore leaves it alone"


@contextlib.contextmanager
def open_image_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open the file of an image, at its beginning; a UserError names one that holds none."""
    try:
        file = open_regular(path, MAX_IMAGE_BYTES)
    except FileNotFoundError:
        raise UserError(f"image {path}: {missing_message(path)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"image {path}: {describe_failure(error)}") from None
    with file:
        check_beginning(file.read(len(LFS_POINTER)), f"image {path}")
        file.seek(0)
        yield file


@contextlib.contextmanager
def open_header(
    source: BinaryIO | BytesIO, name: str, max_pixels: int = MAX_PIXELS
) -> Iterator[Image.Image]:
    """Open an image whose pixels are not decoded yet; errors in `with` become a UserError."""
    with ignore_thread_warnings():
        try:
            with Image.open(source, formats=readable_formats()) as image:
                _check_size(image, max_pixels)
                yield image
                return
        except Image.DecompressionBombError:
            reason = _too_large_message("it", MAX_PIXELS)
        except UnidentifiedImageError:
            reason = f"not an image; readable are {', '.join(readable_formats())}"
        except UserError as error:
            reason = str(error)
        except Exception as error:  # a decoder may raise anything on a broken file
            reason = f"cannot be read, it is broken or cut off ({one_line(error, max_lines=1)})"
    raise UserError(f"{name}: {reason}")


def check_beginning(beginning: bytes, name: str) -> None:
    """Raise a UserError, which calls the image `name`, where a file so begun holds none."""
    if not beginning:
        raise UserError(f"{name}: is empty (0 bytes)")
    if beginning.startswith(LFS_POINTER):
        raise UserError(f"{name}: {LFS_MESSAGE}")


def to_rgb_image(image: Image.Image, name: str) -> Image.Image:
    """Convert an image in memory to what `decode_rgb` returns for its file."""
    try:
        _check_size(image, MAX_PIXELS)
        return _convert_rgb(image)
    except (UserError, ValueError, OSError, AttributeError) as error:  # the last: it is closed
        raise UserError(f"{name}: {one_line(error, max_lines=1)}") from error


@functools.cache
def readable_formats() -> list[str]:
    """Return those of IMAGE_FORMATS that the installed PIL can read."""
    Image.init()
    return [name for name in IMAGE_FORMATS if name in Image.OPEN]


def _reduced_size(size: tuple[int, int], draft_side: int) -> tuple[int, int]:
    """Return the size with longest edge `draft_side`, below which the decoder does not go."""
    return max(1, size[0] * draft_side // max(size)), max(1, size[1] * draft_side // max(size))


def _check_size(image: Image.Image, max_pixels: int) -> None:
    """Raise a UserError for more pixels, or more memory of the decoder, than are allowed."""
    described = f"{image.width} x {image.height}"
    if image.width * image.height > max_pixels:
        raise UserError(_too_large_message(described, max_pixels))
    needed = _decoding_bytes(image)
    if needed > MAX_DECODING_BYTES:
        what = f"{described} pixels in {image.format or 'memory'} ({image.mode})"
        raise UserError(
            f"too large: {what} take {format_bytes(needed)} of memory; at most "
            f"{format_bytes(MAX_DECODING_BYTES)} are allowed"
        )


def _decoding_bytes(image: Image.Image) -> int:
    """Return the memory that decoding takes at its peak, the result in RGB included."""
    per_pixel = DECODING_BYTES.get(image.format or "", 0)
    if image.info.get("progressive"):
        per_pixel = RGB_BYTES + COEFFICIENT_BYTES * len(image.getbands())
    per_pixel = max(per_pixel, _MODE_BYTES.get(image.mode, 4) + RGB_BYTES)
    tags = getattr(image, "tag_v2", {})  # a tile of a TIFF is decoded whole, whatever is used of it
    tile = int(tags.get(_TILE_WIDTH, 0)) * int(tags.get(_TILE_HEIGHT, 0))
    return max(image.width * image.height, tile) * per_pixel


def _check_codestream_end(source: BinaryIO | BytesIO) -> None:
    """Refuse a JPEG 2000 without its last marker: where a tile ends, its decoder sees no cut.

    What a cut left out would be black. No packet has the marker's two bytes in it.
    """
    position = source.tell()
    source.seek(0)
    content = source.read(MAX_IMAGE_BYTES)
    source.seek(position)
    if content.find(_JPEG_2000_END, max(0, content.find(_JPEG_2000_START))) < 0:
        raise UserError("cannot be read, it is broken or cut off (its last marker is missing)")


def _too_large_message(described: str, max_pixels: int) -> str:
    return f"too large: {described} has more than {max_pixels // 10**6} million pixels"


def _convert_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB. PIL alone would clip 16-bit gray instead of scaling it."""
    if image.mode == "I" or image.mode.startswith("I;"):
        return _scale_gray(image).convert("RGB")
    if image.mode == "F":
        raise UserError("floating-point gray levels have no agreed brightness; save it with 8 bits")
    if image.mode == "RGB":  # `convert` would copy it
        image.load()
        return image
    return image.convert("RGB")


def _scale_gray(image: Image.Image) -> Image.Image:
    """Scale gray levels of 0 to 65535 to 8 bits, strip by strip: whole numbers take 8 bytes."""
    image.load()
    scaled = Image.new("L", image.size)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        levels = np.asarray(strip).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise UserError("gray levels outside 0 to 65535 have no agreed brightness")
        eight_bits = ((levels * 255 + 32767) // 65535).astype(np.uint8)
        scaled.paste(Image.fromarray(eight_bits), (0, top))
    return scaled
