"""An opened image before it is resized to a square: turned, padded or cut. Imports no torch."""

from __future__ import annotations

from PIL import Image, ImageOps

from vlbench.data.image_decoding import explain_exif_failure
from vlbench.data.sample import LazyImage
from vlbench.errors import UserError

MAX_SIDE = 8000  # pixels, longest side of a square canvas (64 megapixels) and of its content


def open_whole(image: LazyImage, exif: bool) -> Image.Image:
    """Return an image in RGB at its full size, turned as its EXIF orientation says if `exif`.

    So people are shown a picture as the model is (`ImageTransform.exif`).
    """
    opened: Image.Image = image.open()
    return turn_upright(opened, image.name) if exif else opened


def turn_upright(image: Image.Image, name: str) -> Image.Image:
    """Return an image turned as its EXIF orientation says; a UserError if that cannot be read."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # a parser of EXIF may raise anything on broken bytes
        raise UserError(f"image {name}: {explain_exif_failure(error)}") from error


def pad_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Centre an image in a square; an odd pixel of padding goes to the bottom or right."""
    longest = max(image.size)
    if longest > MAX_SIDE:  # a strip of 30000 x 2 would need a canvas of 2.7 GB
        width, height = (max(1, round(edge * MAX_SIDE / longest)) for edge in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), colour)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def crop_strip(image: Image.Image, shortest_edge: int) -> Image.Image:
    """Shorten a strip that would exceed MAX_SIDE; the centre crop drops its ends anyway."""
    short = min(image.size)
    longest = max(short, short * max(MAX_SIDE, 2 * shortest_edge) // shortest_edge)
    width, height = (min(edge, longest) for edge in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
