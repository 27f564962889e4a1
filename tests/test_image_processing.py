"""Pixels equal those of the reference; unusual image files are read or refused by name."""

from __future__ import annotations

import json
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_release import load_records
from PIL import Image
from safetensors.torch import load_file

from vlbench.data.image_processing import (
    ImageFile,
    ImageTransform,
    blank_image,
    open_image,
)
from vlbench.data.packing import normalize_levels
from vlbench.data.square_images import MAX_SIDE
from vlbench.errors import UserError

GOLDEN = Path(__file__).parent / "goldens/yi_vl/tiny_a"
CASES = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))
TENSORS = load_records() | load_file(GOLDEN / "cases/preprocess.safetensors")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TRANSFORM = ImageTransform(56, 56, MEAN, STD)
# The reference clips 16-bit gray; we scale it (checked below).
RECORDED = [r["image"] for r in CASES["preprocessing"] if r["image"] != "gray16_wide.png"]


def golden(image: str, kind: str) -> torch.Tensor:
    """Find the record of an image among the preprocessing records or the cases that show it."""
    if f"{kind}.{image[:-4]}" in TENSORS:
        return TENSORS[f"{kind}.{image[:-4]}"]
    case = next(c for c in CASES["cases"] if image in c["images"])
    return TENSORS[f"{case['name']}.{kind}"][case["images"].index(image)]


@pytest.mark.parametrize("image", RECORDED)
def test_pixels_equal_the_reference(image):
    picture = open_image(GOLDEN / "images" / image)
    assert np.array_equal(
        TRANSFORM.resize_and_crop(picture), golden(image, "resized_uint8").numpy()
    )
    pixels = TRANSFORM(picture)
    assert pixels.dtype == torch.float32 and pixels.shape == (3, 56, 56)
    assert (pixels - golden(image, "pixel_values")).abs().max() <= 2e-6


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=["cpu", "cuda"]
)
def test_levels_become_the_same_pixels_on_any_device(device):
    """Every level of every channel, and a photograph: the bits of what the CPU normalises."""
    values = TRANSFORM.level_values()
    every = torch.arange(256, dtype=torch.uint8).expand(3, 256)[None, :, None]
    on_device = normalize_levels(every.to(device), values.to(device)).cpu()
    mean, std = (np.asarray(v, np.float32)[:, None] for v in (MEAN, STD))
    reference = ((np.arange(256) * (1 / 255)).astype(np.float32) - mean) / std
    assert np.array_equal(on_device[0, :, 0].numpy().view(np.int32), reference.view(np.int32))
    image = ImageFile(GOLDEN / "images/large_rgb.png")
    levels = TRANSFORM.load_levels(image)
    assert levels.dtype == torch.uint8 and levels.shape == (3, 56, 56)
    pixels = normalize_levels(levels[None].to(device), values.to(device)).cpu()
    assert torch.equal(pixels[0], TRANSFORM.load_pixels(image))


@pytest.mark.parametrize("name", ["large_rgb", "tall_rgb", "wide_rgb"])
def test_without_padding_the_centre_is_cut_out(name):
    pixels = ImageTransform(56, 56, MEAN, STD, pad=False)(open_image(GOLDEN / f"images/{name}.png"))
    assert (pixels - TENSORS[f"cli_pixel_values.{name}"]).abs().max() <= 2e-6


def test_sixteen_bits_are_scaled_where_the_reference_clips():
    path = GOLDEN / "images/gray16_wide.png"
    with Image.open(path) as raw:
        levels, clipped = np.asarray(raw), TRANSFORM(raw.convert("RGB"))
    assert (clipped - golden("gray16_wide.png", "pixel_values")).abs().max() <= 2e-6
    gray = np.asarray(open_image(path))
    assert np.array_equal(gray[..., 0], np.round(levels / 257).astype(np.uint8))


@pytest.mark.parametrize("kind", ["I;16", "I;16B", "I"])
def test_every_integer_gray_is_scaled(tmp_path, kind):
    levels = np.array([[0, 257, 32896, 65535]], dtype=np.int32)
    types = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}
    picture = Image.frombytes(kind, (4, 1), levels.astype(types[kind]).tobytes())
    picture.save(tmp_path / "gray.tif")
    assert np.asarray(open_image(tmp_path / "gray.tif"))[0, :, 0].tolist() == [0, 1, 128, 255]


def frames(mode: str = "RGB") -> list[Image.Image]:
    return [Image.new("RGB", (40, 30), colour).convert(mode) for colour in ("red", "blue")]


def palette() -> Image.Image:
    picture = Image.new("RGB", (40, 30), "red").quantize(4)
    picture.info["transparency"] = b"\x10\x80"
    return picture


SAVED = {
    "cmyk.jpg": lambda p: Image.new("CMYK", (40, 30), (0, 255, 255, 0)).save(p, quality=95),
    "phone.jpg": lambda p: frames()[0].save(
        p, format="MPO", save_all=True, append_images=frames()[1:], quality=95
    ),
    "animated.gif": lambda p: frames()[0].save(p, save_all=True, append_images=frames()[1:]),
    "animated.webp": lambda p: frames()[0].save(
        p, save_all=True, append_images=frames()[1:], lossless=True
    ),
    "animated.png": lambda p: frames()[0].save(p, save_all=True, append_images=frames()[1:]),
    "palette.png": lambda p: palette().save(p, transparency=b"\x10\x80"),
    "alpha.png": lambda p: Image.new("RGBA", (40, 30), (255, 0, 0, 90)).save(p),
    "wrong_suffix.png": lambda p: frames()[0].save(p, format="JPEG", quality=95),
    "bitmap.bmp": lambda p: frames()[0].save(p),
}


@pytest.mark.parametrize("name", SAVED)
def test_unusual_kinds_are_red_images(tmp_path, name, capfd):
    SAVED[name](tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = open_image(tmp_path / name)
    assert picture.mode == "RGB" and picture.size == (40, 30)
    assert np.abs(np.asarray(picture).astype(int) - (255, 0, 0)).max() <= 6
    assert TRANSFORM(picture).isfinite().all()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA", "CMYK"])
@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 7)])
def test_every_mode_and_tiny_size_gives_pixels(tmp_path, mode, size):
    Image.new(mode, size).save(tmp_path / f"tiny.{'tif' if mode == 'CMYK' else 'png'}")
    picture = open_image(next(tmp_path.iterdir()))
    assert TRANSFORM(picture).shape == (3, 56, 56)


@pytest.mark.parametrize("size", [(30000, 2), (2, 30000)])
@pytest.mark.parametrize("pad", [True, False])
def test_strips_stay_within_bounds(tmp_path, size, pad, monkeypatch):
    Image.new("RGB", size, "red").save(tmp_path / "strip.png")
    made = []
    resize, new = Image.Image.resize, Image.new

    def spy_resize(self, edges, *args, **kwargs):
        made.append(edges)
        return resize(self, edges, *args, **kwargs)

    def spy_new(mode, edges, *args, **kwargs):
        made.append(edges)
        return new(mode, edges, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", spy_resize)
    monkeypatch.setattr(Image, "new", spy_new)
    transform = ImageTransform(56, 56, MEAN, STD, pad)
    assert transform(open_image(tmp_path / "strip.png")).shape == (3, 56, 56)
    assert made and all(width * height <= MAX_SIDE**2 for width, height in made)


def chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def png(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 100)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def half(name: str) -> bytes:
    import io

    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, format=name)
    return stream.getvalue()[: len(stream.getvalue()) // 2]


def cut_at_tile() -> bytes:
    """Return a JPEG 2000 that ends where its last tile begins, after the marker SOT."""
    import io

    stream = io.BytesIO()
    Image.new("RGB", (64, 64), "gray").save(stream, "JPEG2000", no_jp2=True, tile_size=(32, 32))
    return stream.getvalue()[: stream.getvalue().rindex(b"\xff\x90") + 2]


BROKEN = {
    "empty.png": (b"", "is empty"),
    "half.jpg": (half("JPEG"), "cut off"),
    "half.png": (half("PNG"), "cut off"),
    "half.webp": (half("WEBP"), "image"),
    "half.gif": (half("GIF"), "cut off"),
    "half.tiff": (half("TIFF"), "image"),
    "half.jp2": (half("JPEG2000"), "cut off"),
    "tiles.j2k": (cut_at_tile(), "cut off"),
    "text.jpg": (b"this is a text, not an image", "not an image; readable are JPEG"),
    "program.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "header.jpg": (b"\xff\xd8\xff\xe0", "image"),
    "bomb.png": (png(30000, 30000), "too large"),
    "large.png": (png(13400, 13400), "too large"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named_in_one_line(tmp_path, name, capfd):
    content, words = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=words) as caught:
            open_image(tmp_path / name)
    text = str(caught.value)
    assert name in text and "\n" not in text and caught.value.__cause__ is None
    assert capfd.readouterr() == ("", "")


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.png: does not exist"):
        ImageFile(tmp_path / "gone.png").open()
    with pytest.raises(UserError, match="is a folder"):
        open_image(tmp_path)
    with pytest.raises(UserError, match="cannot be opened"):
        open_image("a\0b.png")


def test_floating_point_gray_is_refused(tmp_path):
    Image.new("F", (4, 4), 0.5).save(tmp_path / "f.tif")
    with pytest.raises(UserError, match=r"f\.tif: floating-point"):
        open_image(tmp_path / "f.tif")


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (40, 30)


def test_blank_has_the_size_and_the_mean_colour():
    picture = blank_image(ImageFile(GOLDEN / "images/wide_rgb.png"), MEAN)
    opened = picture.open()
    assert opened.size == (151, 64) and opened.getpixel((9, 9)) == (122, 116, 104)
    assert TRANSFORM(opened).abs().max() < 0.02


def test_hash_tells_transforms_apart():
    assert TRANSFORM.transform_hash() == ImageTransform(56, 56, MEAN, STD).transform_hash()
    others = [ImageTransform(60, 56, MEAN, STD), ImageTransform(56, 56, MEAN, STD, pad=False)]
    assert len({TRANSFORM.transform_hash(), *(other.transform_hash() for other in others)}) == 3
    with pytest.raises(UserError, match="crop=60"):
        ImageTransform(56, 60, MEAN, STD)
