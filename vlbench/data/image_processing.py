"""From an image file to the pixels that the tower sees; torch is imported when they are made.

One transform serves training, evaluation and chat: pad to a square in the mean colour, resize the
shortest edge (bicubic), crop the centre, rescale, normalise. EXIF orientation is not applied and
alpha is dropped, as in the Yi-VL reference. JPEGs are decoded in full, unless `draft` asks for the
decoder's own reduction of large ones, which is faster and moves pixels a little.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

from vlbench.data.sample import LazyImage
from vlbench.errors import UserError, one_line
from vlbench.process_settings import ignore_thread_warnings
from vlbench.text_files import LFS_POINTER

if TYPE_CHECKING:
    from torch import Tensor

# Formats that are decoded inside this process; others (EPS, PDF) would start programs.
IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
MAX_PIXELS = 178_956_970  # larger pictures are refused (a small file can hold a huge picture)
MAX_SIDE = 8000  # longest side of a square canvas (64 megapixels) and of what is fitted into it
LFS_MESSAGE = "is a Git-LFS pointer and not the picture; run git lfs pull"
_ZERO_MARK = "vlbench: zero"  # in the `info` of the picture of `Zero`
_TRANSFORM_RULES = (
    "bicubic, pad at floor, centre crop, 1/255 in float64, normalise in float32, 8000"
)


@dataclass(frozen=True)
class ImageFile:
    """A picture in a file."""

    path: str | Path

    @property
    def name(self) -> str:
        """Give the path."""
        return str(self.path)

    def open(self) -> Image.Image:
        """Return the picture in RGB; see `open_image`."""
        return open_image(self.path)

    def open_draft(self, draft_side: int) -> Image.Image:
        """Return the picture in RGB; a JPEG may be decoded smaller, its longest edge >= `side`."""
        return open_image(self.path, draft_side)


def open_image(path: str | Path, draft_side: int = 0) -> Image.Image:
    """Open a picture in RGB: of several frames the first, 16 bits scaled to 8, alpha dropped.

    With `side` a JPEG may come smaller, by the decoder's own reduction. Raises a Mistake that names
    the file when it is missing, empty, broken, too large or no picture.
    """
    refusal = _refusal_reason(Path(path))
    if refusal:
        raise UserError(f"image {path}: {refusal}")
    return _decode_rgb(path, f"image {path}", draft_side)


def open_image_bytes(data: bytes, name: str, draft_side: int = 0) -> Image.Image:
    """Open a picture from the bytes of a file, as `open_image` would; mistakes call it `name`."""
    if not data:
        raise UserError(f"{name}: is empty (0 bytes)")
    if data.startswith(LFS_POINTER):
        raise UserError(f"{name}: {LFS_MESSAGE}")
    return _decode_rgb(BytesIO(data), name, draft_side)


def _decode_rgb(source: str | Path | BytesIO, name: str, draft_side: int = 0) -> Image.Image:
    """Decode a picture in RGB, or raise a Mistake that calls it `name`."""
    with ignore_thread_warnings():
        try:
            with Image.open(source, formats=_readable_formats()) as image:
                _check_size(image)
                if draft_side:
                    image.draft(None, _reduced_size(image.size, draft_side))
                return _convert_rgb(image)
        except Image.DecompressionBombError:
            reason = _too_large_message("it")
        except UnidentifiedImageError:
            reason = f"not a picture; readable are {', '.join(_readable_formats())}"
        except UserError as mistake:
            reason = str(mistake)
        except Exception as error:  # a decoder may raise anything on a broken file
            reason = f"cannot be read, it is broken or cut off ({one_line(error, max_lines=1)})"
    raise UserError(f"{name}: {reason}")


def _reduced_size(size: tuple[int, int], draft_side: int) -> tuple[int, int]:
    """Return the size at which the longest edge is `side`: the decoder stays above it."""
    return max(1, size[0] * draft_side // max(size)), max(1, size[1] * draft_side // max(size))


def to_rgb_image(image: Image.Image, name: str) -> Image.Image:
    """Return a picture that is already in memory as `open_image` would return its file."""
    try:
        _check_size(image)
        return _convert_rgb(image)
    except (UserError, ValueError, OSError, AttributeError) as error:  # the last of a closed file
        raise UserError(f"{name}: {one_line(error, max_lines=1)}") from error


def _refusal_reason(path: Path) -> str:
    """Say why a path cannot hold a picture, or return an empty text."""
    try:
        if path.is_dir():
            return "is a folder, not a picture"
        if path.stat().st_size == 0:
            return "is empty (0 bytes)"
        with path.open("rb") as file:
            return LFS_MESSAGE if file.read(len(LFS_POINTER)) == LFS_POINTER else ""
    except FileNotFoundError:
        return "does not exist"
    except (OSError, ValueError) as error:
        return (
            f"cannot be opened ({getattr(error, 'strerror', None) or one_line(error, max_lines=1)})"
        )


@functools.cache
def _readable_formats() -> list[str]:
    """Return those of FORMATS that the installed PIL can read."""
    Image.init()
    return [name for name in IMAGE_FORMATS if name in Image.OPEN]


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise UserError(_too_large_message(f"{image.width} x {image.height}"))


def _too_large_message(described: str) -> str:
    return f"too large: {described} has more than {MAX_PIXELS // 10**6} million pixels"


def _convert_rgb(image: Image.Image) -> Image.Image:
    """Decode a picture as RGB. PIL alone would clip 16-bit gray instead of scaling it."""
    if image.mode == "I" or image.mode.startswith("I;"):
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise UserError("gray levels outside 0 to 65535 have no agreed brightness")
        image = Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "F":
        raise UserError("floating-point gray levels have no agreed brightness; save it with 8 bits")
    return image.convert("RGB")


@dataclass(frozen=True)
class ImageTransform:
    """From a picture to the tower's pixels, exactly as the Yi-VL reference does."""

    size: int  # length of the shortest edge after the resize, pixels
    crop: int  # side of the square that is cut from the centre, pixels
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pad: bool = True  # first pad to a square in the mean colour
    draft: bool = False  # large JPEGs are decoded smaller, which only `of` can do

    def __post_init__(self) -> None:
        if not 0 < self.crop <= self.size:
            raise UserError(f"image transform: crop={self.crop} must be in 1..size={self.size}")

    def load_pixels(self, image: LazyImage) -> Tensor:
        """Return the pixels of a picture that is not opened yet."""
        drafted = getattr(image, "open_draft", None) if self.draft and self.pad else None
        return self(drafted(self.size) if drafted else image.open())

    def __call__(self, image: Image.Image) -> Tensor:
        """Return float32 pixels `[3, crop, crop]`; of `Zero` they are all 0."""
        import torch

        if _ZERO_MARK in image.info:
            return torch.zeros(3, self.crop, self.crop)
        planes = self.resize_and_crop(image).transpose(2, 0, 1)
        values = np.empty(planes.shape, np.float32)
        for plane, levels, value in zip(planes, self._normalized_levels(), values, strict=True):
            np.take(levels, plane, out=value, mode="clip")  # without a check of every pixel
        return torch.from_numpy(values)

    def _normalized_levels(self) -> np.ndarray:
        """Return what each of the 256 levels of each channel becomes, float32 `[3, 256]`."""
        levels = (np.arange(256) * (1 / 255)).astype(np.float32)  # rescaled in float64
        mean, std = (np.asarray(one, np.float32)[:, None] for one in (self.mean, self.std))
        return (levels - mean) / std

    def resize_and_crop(self, image: Image.Image) -> np.ndarray:
        """Return the uint8 picture `[crop, crop, 3]` before it is normalised."""
        image = image.convert("RGB")
        if self.pad and image.width != image.height:
            image = _pad_square(image, mean_colour(self.mean))
        elif not self.pad:
            image = _crop_strip(image, self.size)
        width, height = image.size
        short, long = min(width, height), int(self.size * max(width, height) / min(width, height))
        edges = (self.size, long) if width == short else (long, self.size)
        image = image.resize(edges, Image.Resampling.BICUBIC)
        left, top = ((edge - self.crop) // 2 for edge in edges)
        return np.asarray(image.crop((left, top, left + self.crop, top + self.crop)))

    def transform_hash(self) -> str:
        """Return 16 characters that change whenever the transform's result may change."""
        said = {**asdict(self), "rules": _TRANSFORM_RULES}
        if not self.draft:
            del said["draft"]  # as before there was a choice
        text = json.dumps(said, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def mean_colour(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    """Return the mean colour in 8 bits, truncated as in the reference."""
    red, green, blue = (int(channel * 255) for channel in mean)
    return red, green, blue


def _pad_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Put a picture in the middle of a square; an odd pixel goes to the bottom or right."""
    longest = max(image.size)
    if longest > MAX_SIDE:  # a strip of 30000 x 2 would need a canvas of 2.7 GB
        width, height = (max(1, round(edge * MAX_SIDE / longest)) for edge in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), colour)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def _crop_strip(image: Image.Image, shortest_edge: int) -> Image.Image:
    """Cut the ends off a strip that would become longer than MAX_SIDE: the crop never sees them."""
    short = min(image.size)
    longest = max(short, short * max(MAX_SIDE, 2 * shortest_edge) // shortest_edge)
    width, height = (min(edge, longest) for edge in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


@dataclass(frozen=True)
class BlankImage:
    """A picture of the same size in one colour: what a blind model sees."""

    image: LazyImage
    colour: tuple[int, int, int]

    @property
    def name(self) -> str:
        """Give the name of the picture that is hidden."""
        return f"{self.image.name} (blank)"

    def open(self) -> Image.Image:
        """Return the plain picture in RGB."""
        return Image.new("RGB", self.image.open().size, self.colour)


def blank_image(image: LazyImage, mean: tuple[float, float, float]) -> BlankImage:
    """Return a picture of the same size in the mean colour."""
    return BlankImage(image, mean_colour(mean))


@dataclass(frozen=True)
class ZeroImage:
    """No picture, where a place for one stands in the text: its pixels are 0 after normalising.

    No colour of 8 bits gives that, for the mean colour is no whole number; so the picture carries
    a mark, by which `ImageTransform` knows it. People see it black.
    """

    name: str = "no picture (all pixels zero)"

    def open(self) -> Image.Image:
        """Return one black pixel with the mark."""
        image = Image.new("RGB", (1, 1))
        image.info[_ZERO_MARK] = True
        return image
