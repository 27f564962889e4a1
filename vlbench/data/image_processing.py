"""Image preprocessing: from a file to the vision encoder's pixels. Imports torch lazily.

One transform serves training, evaluation and chat: make a square (pad it in the mean colour, crop
its centre, or squash it), resize, rescale, normalise. Alpha is dropped and EXIF orientation is not
applied, as in the Yi-VL reference, unless `exif` asks for it. JPEGs are decoded at full size,
unless `draft` asks for the decoder's own downscaling of large ones, which is faster and changes
pixels slightly.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlbench.config.key_types import MAX_IMAGE_SIZE
from vlbench.data.image_decoding import MAX_PIXELS, check_beginning, decode_rgb, open_image_file
from vlbench.data.image_folder import is_inside, outside_message
from vlbench.data.image_size import file_image_size, read_image_size
from vlbench.data.image_tiling import ImageTiling, TiledImage
from vlbench.data.native_aspect import NativeImage, lay_patches
from vlbench.data.sample import LazyImage
from vlbench.data.square_images import crop_strip, pad_square, turn_upright
from vlbench.data.view_pixels import cut_views
from vlbench.errors import UserError
from vlbench.regular_files import MAX_IMAGE_BYTES, describe_failure, read_regular

if TYPE_CHECKING:
    from torch import Tensor

MAX_RESIZED_SIDE = 2 * MAX_IMAGE_SIZE  # pixels, shortest edge; a release resizes to 1.15 crops
INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "nearest")
_ZERO_MARK = "vlbench: zero"  # a key in the `info` of the image of a ZeroImage
_TRANSFORM_RULES = (
    "bicubic, pad at floor, centre crop, 1/255 in float64, normalise in float32, 8000"
)


@dataclass(frozen=True)
class ImageFile:
    """An image in a file."""

    path: str | Path
    folder: str | None = None
    """The images' folder of a data set, which the file must be in; None: the user named it."""
    allow_outside: bool = False
    """Whether it is read outside of the folder as well."""

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    @property
    def is_outside(self) -> bool:
        """Whether the file is outside of the data set's folder, so that no page shows it."""
        return self.folder is not None and not is_inside(self.path, self.folder)

    def open(self) -> Image.Image:
        """Return the image in RGB; see `open_image`."""
        self.refuse_outside()
        return open_image(self.path)

    def open_draft(self, draft_side: int) -> Image.Image:
        """Return the image in RGB; a JPEG may be downscaled to a longest edge >= `draft_side`."""
        self.refuse_outside()
        return open_image(self.path, draft_side)

    def read_size(self, exif: bool) -> tuple[int, int]:
        """Return width and height in pixels from the header of the file."""
        self.refuse_outside()
        return file_image_size(self.path, exif)

    def read_bytes(self) -> bytes:
        """Return the bytes of the file; a UserError names one that cannot be read."""
        self.refuse_outside()
        try:
            return read_regular(self.path, MAX_IMAGE_BYTES)
        except (OSError, ValueError) as error:
            raise UserError(f"image {self.path}: {describe_failure(error)}") from error

    def refuse_outside(self) -> None:
        """Raise a UserError for a file outside of the folder, unless that is allowed."""
        if not self.allow_outside and self.is_outside:
            raise UserError(f"image {self.path}: {outside_message(str(self.folder))}")


def open_image(path: str | Path, draft_side: int = 0) -> Image.Image:
    """Open an image in RGB: of several frames the first, 16 bits scaled to 8, alpha dropped.

    With `draft_side` the decoder may downscale a JPEG, to a longest edge of at least that many
    pixels. Raises a UserError that names the file when it is missing, empty, broken, too large,
    no regular file or not an image.
    """
    with open_image_file(path) as file:
        return decode_rgb(file, f"image {path}", draft_side)


def open_image_bytes(
    data: bytes, name: str, draft_side: int = 0, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Open an image from the bytes of a file, as `open_image` does; errors call it `name`.

    An image of more than `max_pixels` is refused before it is decoded.
    """
    check_beginning(data, name)
    return decode_rgb(BytesIO(data), name, draft_side, max_pixels)


@dataclass(frozen=True)
class ImageTransform:
    """From an image to the vision encoder's pixels, exactly as the Yi-VL reference does.

    Args:
        size: Length of the shortest edge after the resize, pixels.
        crop: Side of the square that is cut from the centre, pixels.
        mean: Of each channel, subtracted from values in 0..1.
        std: Of each channel, the divisor.
        pad: Whether the image is first padded to a square in the mean colour.
        draft: Whether large JPEGs are decoded at a smaller size, which only `load_pixels` and
            `load_levels` can do.
        exif: Whether an image is turned as its EXIF orientation says, once it is opened.
        squash: Whether the image is resized to a square whatever its sides, and nothing is padded.
        interpolation: Of the resize, one of INTERPOLATIONS.
        second: What a second vision encoder sees of the same image: three further channels. Of two
            sizes the smaller is in the top left corner, with zeros beside it.
        tiling: By which rule an image becomes several views, squares of `crop` pixels; None: it is
            one. A `TiledImage` is what has its grid; `size`, `pad` and `squash` are then unused.
        native: Whether images keep their aspect ratios: their pixels are sheets of patches
            (`native_aspect`). A `NativeImage` is what has its grid.
    """

    size: int
    crop: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pad: bool = True
    draft: bool = False
    exif: bool = False
    squash: bool = False
    interpolation: str = "bicubic"
    second: ImageTransform | None = None
    tiling: ImageTiling | None = None
    native: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.crop <= self.size:
            raise UserError(f"image transform: crop={self.crop} must be in 1..size={self.size}")
        if self.size > MAX_RESIZED_SIDE:
            raise UserError(
                f"image transform: size={self.size} pixels; at most {MAX_RESIZED_SIDE} are allowed"
            )

    @property
    def channels(self) -> int:
        """Channels of the pixels: 3, and 3 more for a second vision encoder."""
        return 3 if self.second is None else 6

    @property
    def can_draft(self) -> bool:
        """Whether `draft` can change pixels: what is squashed or cropped is decoded in full."""
        return self.pad or self.native or self.tiling is not None

    def load_pixels(self, image: LazyImage) -> Tensor:
        """Open an image and return its float32 pixels `[channels, crop, crop]`.

        Of a `TiledImage` they are those of its views, `[views, channels, crop, crop]`.
        """
        opened = self.open_image(image)
        return self._view_pixels(opened, image) if isinstance(image, TiledImage) else self(opened)

    def open_image(self, image: LazyImage) -> Image.Image:
        """Open an image in RGB, at the size and in the orientation in which it is transformed."""
        side = max(self.size, self.second.size if self.second else 0)
        can_draft = self.draft and self.pad
        if isinstance(image, TiledImage):
            can_draft, side = self.draft, self._draft_side(image)
            image = image.image
        open_draft = getattr(image, "open_draft", None) if can_draft else None
        opened: Image.Image = open_draft(side) if open_draft else image.open()
        return turn_upright(opened, image.name) if self.exif else opened

    def _draft_side(self, tiled: TiledImage) -> int:
        if isinstance(tiled, NativeImage):
            return tiled.longest_edge()
        return tiled.draft_side(self._require_tiling(), self.crop)

    def __call__(self, image: Image.Image) -> Tensor:
        """Return float32 pixels `[channels, crop, crop]`; those of a ZeroImage are all 0."""
        own = self._pixels(image)
        return own if self.second is None else _stack_channels(own, self.second(image))

    def _view_pixels(self, image: Image.Image, tiled: TiledImage) -> Tensor:
        """Return float32 pixels `[views, 3, crop, crop]`; those of a ZeroImage are all 0."""
        import torch

        if _ZERO_MARK in image.info:
            return torch.zeros(len(tiled.views), 3, self.crop, self.crop)
        return torch.stack([self._normalize(view) for view in self.cut_views(image, tiled)])

    def _pixels(self, image: Image.Image) -> Tensor:
        import torch

        if _ZERO_MARK in image.info:
            return torch.zeros(3, self.crop, self.crop)
        return self._normalize(self.resize_and_crop(image))

    def _normalize(self, square: NDArray[np.uint8]) -> Tensor:
        """Return `[crop, crop, 3]` normalised, `[3, crop, crop]`."""
        import torch

        planes = square.transpose(2, 0, 1)
        pixels = np.empty(planes.shape, np.float32)
        for plane, values, channel in zip(planes, self._level_values(), pixels, strict=True):
            np.take(values, plane, out=channel, mode="clip")  # clip: no bounds check per pixel
        return torch.from_numpy(pixels)

    def load_levels(self, image: LazyImage) -> Tensor:
        """Open an image and return its uint8 pixels `[channels, crop, crop]`, not normalised.

        Of a `TiledImage` they are those of its views, `[views, channels, crop, crop]`.
        `level_values` has what each of them becomes. Raises a UserError for a ZeroImage, which is
        no 8-bit image.
        """
        import torch

        opened = self.open_image(image)
        if _ZERO_MARK in opened.info:
            raise UserError(f"image {image.name}: is absent, and can only be asked about")
        if isinstance(image, TiledImage):
            views = self.cut_views(opened, image).transpose(0, 3, 1, 2)
            return torch.from_numpy(np.ascontiguousarray(views))
        own = self._levels(opened)
        return own if self.second is None else _stack_channels(own, self.second._levels(opened))

    def _levels(self, image: Image.Image) -> Tensor:
        import torch

        planes = self.resize_and_crop(image).transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(planes))

    def level_values(self) -> Tensor:
        """Return the normalised value of each level of each channel, float32 `[channels, 256]`."""
        import torch

        own = torch.from_numpy(self._level_values())
        return own if self.second is None else torch.cat([own, self.second.level_values()])

    def _level_values(self) -> NDArray[np.float32]:
        levels = (np.arange(256) * (1 / 255)).astype(np.float32)  # rescaled in float64
        mean, std = (np.asarray(v, np.float32)[:, None] for v in (self.mean, self.std))
        return (levels - mean) / std

    def resize_and_crop(self, image: Image.Image) -> NDArray[np.uint8]:
        """Return the uint8 image `[crop, crop, 3]` before normalisation."""
        image = image if image.mode == "RGB" else image.convert("RGB")
        resample = Image.Resampling[self.interpolation.upper()]
        if self.squash:
            return np.asarray(image.resize((self.crop, self.crop), resample))
        if self.pad and image.width != image.height:
            image = pad_square(image, mean_colour(self.mean))
        elif not self.pad:
            image = crop_strip(image, self.size)
        width, height = image.size
        short, long = min(width, height), int(self.size * max(width, height) / min(width, height))
        edges = (self.size, long) if width == short else (long, self.size)
        image = image.resize(edges, resample)
        left, top = ((edge - self.crop) // 2 for edge in edges)
        return np.asarray(image.crop((left, top, left + self.crop, top + self.crop)))

    def cut_views(self, image: Image.Image, tiled: TiledImage) -> NDArray[np.uint8]:
        """Return the uint8 views `[views, crop, crop, 3]` of an opened image."""
        image = image if image.mode == "RGB" else image.convert("RGB")
        resample = Image.Resampling[self.interpolation.upper()]
        if isinstance(tiled, NativeImage):
            return lay_patches(image, tiled, self.crop, resample)
        return cut_views(image, tiled, self._require_tiling(), self.crop, resample)

    def _require_tiling(self) -> ImageTiling:
        assert self.tiling is not None, "a TiledImage, and a transform without tiling"
        return self.tiling

    def seen_box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Return where the pixels lie over an image: left, top, right, bottom.

        In shares of its width and height: (0, 0, 1, 1) is all of it, and what is padded lies
        outside of 0..1.
        """
        if self.squash:
            return 0.0, 0.0, 1.0, 1.0
        side = max(width, height) if self.pad else min(width, height)
        canvas = (side, side) if self.pad else (width, height)
        starts, ends = [], []
        for edge, canvas_edge in zip((width, height), canvas, strict=True):
            resized = int(self.size * canvas_edge / side)
            start = (resized - self.crop) // 2 * canvas_edge / resized - (canvas_edge - edge) // 2
            starts.append(start / edge)
            ends.append((start + self.crop * canvas_edge / resized) / edge)
        return starts[0], starts[1], ends[0], ends[1]

    def describe(self) -> str:
        """Return in words what becomes of an image, as people read it in a run's report."""
        mean, std = (" ".join(f"{value:.4g}" for value in stats) for stats in (self.mean, self.std))
        square = "squashed to" if self.squash else "padded to" if self.pad else "cropped to"
        if not self.squash and self.size != self.crop:
            square = f"resized to {self.size} and {square}"
        if self.tiling is not None:
            square = f"{self.tiling.describe()}, each"
        if self.native:
            square = "kept in its aspect ratio, on at most the patches of"
        upright = "turned as its EXIF orientation says, " if self.exif else ""
        square = f"{upright}{square} {self.crop} x {self.crop}"
        text = f"{square}, {self.interpolation}, mean {mean}, std {std}"
        text += ", large JPEGs decoded at a smaller size" * self.draft
        return text if self.second is None else f"{text}; and {self.second.describe()}"

    def transform_hash(self, counts_idle_draft: bool = False) -> str:
        """Return a hash of 16 characters over everything that determines the result.

        Up to version 0.1 it counted a `draft` that changes no pixel, too (`counts_idle_draft`).
        """
        draft = self.draft and (self.can_draft or counts_idle_draft)
        settings = {**asdict(self), "draft": draft, "rules": _TRANSFORM_RULES}
        for name in ("draft", "exif", "squash", "interpolation", "second", "tiling", "native"):
            if settings[name] == type(self).__dataclass_fields__[name].default:
                del settings[name]  # keeps the hash of runs that are older than the option
        if self.tiling is not None and not self.tiling.grids:
            del settings["tiling"]["grids"]  # likewise
        text = json.dumps(settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _stack_channels(first: Tensor, second: Tensor) -> Tensor:
    """Return pixels `[3, side, side]` of two sizes as `[6, larger, larger]`, zeros beside them."""
    side = max(first.shape[1], second.shape[1])
    both = first.new_zeros(6, side, side)
    for channel, pixels in ((0, first), (3, second)):
        both[channel : channel + 3, : pixels.shape[1], : pixels.shape[2]] = pixels
    return both


def mean_colour(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    """Return the mean colour in 8 bits, truncated as in the reference."""
    red, green, blue = (int(channel * 255) for channel in mean)
    return red, green, blue


@dataclass(frozen=True)
class BlankImage:
    """An image replaced by one colour at the same size, for evaluation without image content."""

    image: LazyImage
    colour: tuple[int, int, int]

    @property
    def name(self) -> str:
        """The name of the replaced image."""
        return f"{self.image.name} (blank)"

    def read_size(self, exif: bool) -> tuple[int, int]:
        """Return width and height of the replaced image, so that it is tiled as that one."""
        return read_image_size(self.image, exif)

    def open(self) -> Image.Image:
        """Return the plain image in RGB."""
        return Image.new("RGB", self.image.open().size, self.colour)


def blank_image(image: LazyImage, mean: tuple[float, float, float]) -> BlankImage:
    """Return an image of the same size in the mean colour."""
    return BlankImage(image, mean_colour(mean))


@dataclass(frozen=True)
class ZeroImage:
    """An absent image at a placeholder of the text: its pixels are 0 after normalisation.

    No 8-bit colour gives that, as the mean colour is fractional; so the image carries a mark that
    `ImageTransform` recognises. It is shown as black.
    """

    name: str = "no image (all pixels zero)"

    def open(self) -> Image.Image:
        """Return one black pixel with the mark."""
        image = Image.new("RGB", (1, 1))
        image.info[_ZERO_MARK] = True
        return image
