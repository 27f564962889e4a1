"""Odd images and odd settings of tiles: the right views, or one clear line."""

from __future__ import annotations

import io
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from test_view_layout import SIDE, encoder, layout
from test_view_layout import sample as sized_sample

from vlbench.__main__ import main
from vlbench.config.recipe import load_recipe
from vlbench.data.image_processing import ImageFile, ImageTransform
from vlbench.data.image_size import read_image_size
from vlbench.data.image_tiling import TiledImage
from vlbench.data.packing import collate
from vlbench.data.view_layout import NEWLINE_INDEX, ViewLayout
from vlbench.errors import UserError
from vlbench.processor import InMemoryImage

RULES = ("llava_next", "internvl")
HALF = (0.5, 0.5, 0.5)
EDGES = ((1, 5000), (5000, 1), (1, 1), (SIDE, SIDE), (SIDE + 1, SIDE), (2 * SIDE, 2 * SIDE), (3, 2))


def transform_of(given: ViewLayout) -> ImageTransform:
    return ImageTransform(SIDE, SIDE, HALF, HALF, tiling=given.settings.tiling, exif=given.exif)


def tile(given: ViewLayout, image: Any) -> TiledImage:
    size = read_image_size(image, given.exif)
    grid = given.settings.tiling.choose_grid(*size, SIDE)
    return TiledImage(image, size, grid, given.settings.tiling.list_views(grid))


def picture(width: int, height: int) -> Image.Image:
    levels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(levels)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tags", ["newline", "numbered", "none"])
@pytest.mark.parametrize("thumbnail", [True, False])
def test_images_of_any_shape_have_their_views_at_their_positions(rule, tags, thumbnail):
    images = tuple(InMemoryImage(picture(*size)) for size in EDGES)
    for tiles, token_grid in ((1, (2, 2)), (2, None), (6, (2, 2))):
        given = layout(tiles, rule, tags, token_grid, thumbnail)
        encoded = encoder(given, 4096).encode(replace(sized_sample(*EDGES), images=images))
        batch = collate([[encoded]], transform_of(given).load_levels)
        bounds, index = batch.list_view_bounds(), batch.visual_index
        assert bounds[-1] == len(batch.pixels) == encoded.view_count >= len(EDGES)
        shown = index[index >= 0]
        assert len(shown.unique()) == len(shown) and int(shown.max()) < 4 * bounds[-1]
        assert tags == "newline" or NEWLINE_INDEX not in index
        of_images = index.split(encoded.image_lengths)
        for first, end, numbers in zip(bounds, bounds[1:], of_images, strict=False):
            own = numbers[numbers >= 0]
            assert len(own) and 4 * first <= int(own.min()) and int(own.max()) < 4 * end


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("thumbnail", [True, False])
def test_one_tile_is_the_whole_image(rule, thumbnail):
    given = layout(1, rule, thumbnail=thumbnail)
    for size in EDGES:
        whole = picture(*size)
        tiled = tile(given, InMemoryImage(whole))
        [view] = transform_of(given).load_levels(tiled)
        squashed = np.asarray(whole.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        assert np.array_equal(view.permute(1, 2, 0).numpy(), squashed)
        assert given.order_tokens(tiled) == (0, 1, 2, 3, NEWLINE_INDEX)


def exif_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(picture(90, 40), "JPEG", exif=exif.tobytes())


def animation() -> bytes:
    others = [picture(80, 50).rotate(180), picture(80, 50).convert("L").convert("RGB")]
    return saved(picture(80, 50), "GIF", save_all=True, append_images=others)


def transparent_palette() -> bytes:
    indexed = picture(90, 40).quantize(16)
    return saved(indexed, "PNG", transparency=3)


def frame_beyond_the_screen() -> bytes:
    data = bytearray(saved(picture(80, 50), "GIF"))
    data[6:10] = (20).to_bytes(2, "little") + (10).to_bytes(2, "little")
    return bytes(data)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


FILES = {
    "EXIF": exif_jpeg,
    "animated GIF": animation,
    "palette with transparency": transparent_palette,
    "frame beyond the screen": frame_beyond_the_screen,
    "animated WebP": lambda: saved(
        picture(70, 30), "WEBP", save_all=True, append_images=[picture(70, 31).crop((0, 0, 70, 30))]
    ),
    "alpha": lambda: saved(picture(60, 90).convert("RGBA"), "PNG"),
    "CMYK": lambda: saved(picture(60, 90).convert("CMYK"), "JPEG"),
    "one bit": lambda: saved(picture(60, 90).convert("1"), "PNG"),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("exif", [False, True])
@pytest.mark.parametrize("kind", FILES)
def test_a_file_has_the_views_of_its_picture(kind, exif, rule, tmp_path):
    (tmp_path / "image").write_bytes(FILES[kind]())
    given = replace(layout(4, rule), exif=exif)
    file = ImageFile(tmp_path / "image")
    opened = Image.open(tmp_path / "image")
    opened = (ImageOps.exif_transpose(opened) if exif else opened).convert("RGB")
    plain = Image.fromarray(np.asarray(opened))  # nothing but its pixels
    found, expected = (tile(given, one) for one in (file, InMemoryImage(plain)))
    assert (found.grid, found.size) == (expected.grid, expected.size) and len(found.views) > 1
    transform = transform_of(given)
    assert torch.equal(transform.load_levels(found), transform.load_levels(expected))


def with_png_height(height: int) -> bytes:
    data = bytearray(saved(picture(60, 90), "PNG"))
    data[20:24] = height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def with_jpeg_height(height: int) -> bytes:
    data = bytearray(saved(picture(60, 90), "JPEG"))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 2] = height.to_bytes(2, "big")
    return bytes(data)


LIES = {
    f"{kind}, {height}": (write, height)
    for kind, write in (("PNG", with_png_height), ("JPEG", with_jpeg_height))
    for height in (30, 900)
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", LIES)
def test_a_header_that_lies_gives_the_views_that_were_counted_or_one_line(kind, rule, tmp_path):
    """A decoder fills up, cuts off or refuses: the views are as many as were planned."""
    write, height = LIES[kind]
    (tmp_path / "image").write_bytes(write(height))
    given = layout(4, rule)
    tiled = tile(given, ImageFile(tmp_path / "image"))
    assert tiled.size == (60, height)
    try:
        views = transform_of(given).load_levels(tiled)
    except UserError as error:
        assert height == 900 and len(error.lines) == 1 and str(tmp_path) in str(error)
    else:
        assert views.shape == (len(tiled.views), 3, SIDE, SIDE)


def test_an_image_of_another_size_than_was_told_has_the_views_that_were_counted():
    class Liar(InMemoryImage):
        def read_size(self, exif: bool) -> tuple[int, int]:
            return 300, 20

    for rule in RULES:
        given = layout(4, rule)
        tiled = tile(given, Liar(picture(30, 90)))
        views = transform_of(given).load_levels(tiled)
        assert views.shape == (len(tiled.views), 3, SIDE, SIDE)


@pytest.mark.parametrize("grid", [(4,), 4, (2.0, 2.0), "22", (-2, -2), (), [2, 2], (2, 2, 1), True])
def test_a_token_grid_that_is_none_is_one_line(grid: Any):
    with pytest.raises(UserError, match="token_grid is .*rows and columns, as") as raised:
        layout(token_grid=grid)
    assert len(raised.value.lines) == 1


CONNECTOR = """
from torch import nn
from vlbench.connector import Connector

class Mine(Connector):
    def __init__(self, shapes):
        super().__init__()
        self.tokens_per_image, self.token_grid = shapes.patches, (3, 5)
        self.proj = nn.Linear(shapes.vision_width, shapes.lm_width)

    def forward(self, features):
        return self.proj(features)
"""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["vision.max_visual_tokens=16"],
            "max_visual_tokens is 16, and at 56 pixels an image of one view takes 17 visual tokens",
        ),
        (["vision.max_visual_tokens=15", "vision.tiling.tags=none"], "one view takes 16 visual"),
        (["connector.name=mine"], "token_grid is 3 x 5, and its tokens_per_image is 16"),
    ],
)
def test_what_no_image_fits_is_told_before_there_is_a_run(
    words, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("connectors").mkdir()
    Path("connectors/mine.py").write_text(CONNECTOR)
    tiles = ["vision.tiling.tiles=4", "only=chat", "stages.chat.image_size=56"]
    assert main(["fit", "recipe=yivl_llava", "run=run", *tiles, *words]) == 2
    told = capsys.readouterr().err
    assert said in told and len(told.splitlines()) == 1 and not Path("run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["grids=[0x2]"], "must be ROWSxCOLUMNS"),
        (["grids=[1.5x2]"], "must be ROWSxCOLUMNS"),
        (["grids=[-1x2]"], "must be ROWSxCOLUMNS"),
        (["grids=[]"], "a list of at least 1"),
        (["grids=[[1,2]]"], "must be text"),
        (["gird=internvl"], "Did you mean 'grid'"),
        (["tiles=1", "grids=[1x2]"], "tiles=1: with grid=llava_next a grid has at least 2 tiles"),
        (["tiles=0"], "at least 1"),
        (["tiles=2.5"], "a whole number"),
        (["max_views=0"], "at least 1"),
        (["thumbnail=maybe"], "true or false"),
    ],
)
def test_settings_that_cannot_be_are_one_line(words, said):
    with pytest.raises(UserError, match=said) as raised:
        load_recipe(["recipe=yivl_llava", *(f"vision.tiling.{word}" for word in words)])
    assert len(raised.value.lines) == 1
