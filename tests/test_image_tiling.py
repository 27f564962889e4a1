"""Grids and pixels of tiled images are those of transformers; sizes are read from headers."""

from __future__ import annotations

import importlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlbench.data import image_decoding
from vlbench.data.image_processing import ImageFile, ImageTransform, ZeroImage, blank_image
from vlbench.data.image_size import HEADER_BYTES, read_image_size
from vlbench.data.image_tiling import ImageTiling, TiledImage, count_views
from vlbench.data.record_images import EmbeddedImage
from vlbench.data.scene_world import make_scene
from vlbench.data.shards import TarImage
from vlbench.errors import UserError

REFERENCE = json.loads((Path(__file__).parent / "reference_tilings.json").read_text())
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIDE = 56
PHOTOGRAPHS = ((200, 90), (90, 200), (160, 150), (57, 55), (400, 20), (30, 31))


@pytest.mark.parametrize("rule", ["llava_next", "internvl"])
def test_the_grids_of_200_sizes_are_those_of_the_reference(rule):
    assert len(REFERENCE["sizes"]) == 200
    for case in REFERENCE[rule]:
        tiling = ImageTiling(case["tiles"], rule)
        found = [tiling.choose_grid(*size, case["side"]) for size in REFERENCE["sizes"]]
        assert found == [tuple(row[:2]) for row in case["grids"]]


def test_one_tile_is_one_view_and_thumbnails_stand_where_the_reference_has_them():
    for rule in ("llava_next", "internvl"):
        assert ImageTiling(1, rule).list_views((1, 1)) == (None,)
        assert ImageTiling(1, rule).choose_grid(4000, 30, SIDE) == (1, 1)
        assert ImageTiling(4, rule, thumbnail=False).list_views((1, 1)) == (None,)
        assert ImageTiling(4, rule, thumbnail=False).list_views((1, 2)) == ((0, 0), (0, 1))
    assert ImageTiling(4).list_views((1, 2)) == (None, (0, 0), (0, 1))
    assert ImageTiling(4, "internvl").list_views((2, 1)) == ((0, 0), (1, 0), None)


def photograph(width: int, height: int) -> Image.Image:
    """Return a picture with edges and slopes, always the same."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [x * 7 % 256, y * 5 % 256, (x // 9 + y // 7) % 2 * 255]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def transform(rule: str = "llava_next", tiles: int = 4, **options: object) -> ImageTransform:
    return ImageTransform(SIDE, SIDE, MEAN, STD, tiling=ImageTiling(tiles, rule), **options)


def tile(image: object, given: ImageTransform) -> TiledImage:
    size = read_image_size(image, given.exif)
    grid = given.tiling.choose_grid(*size, given.crop)
    return TiledImage(image, size, grid, given.tiling.list_views(grid))


def save(image: Image.Image, path: Path, **options: object) -> ImageFile:
    image.save(path, **options)
    return ImageFile(path)


@pytest.mark.parametrize("size", PHOTOGRAPHS)
def test_views_have_the_pixels_of_llava_next(size, tmp_path):
    module = pytest.importorskip(
        "transformers.models.llava_next.image_processing_pil_llava_next",
        reason="this transformers has no image processor of pillow",
    )
    ours = transform()
    grids = [(r, c) for n in (2, 3, 4) for r in range(1, n + 1) for c in (n / r,) if c == n // r]
    theirs = module.LlavaNextImageProcessorPil(
        image_grid_pinpoints=[[r * SIDE, int(c) * SIDE] for r, c in grids],
        size={"height": SIDE, "width": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=MEAN,
        image_std=STD,
    )(photograph(*size), return_tensors="pt")["pixel_values"][0]
    tiled = tile(save(photograph(*size), tmp_path / "a.png"), ours)
    pixels = ours.load_pixels(tiled)
    assert len(pixels) == count_views(tiled) == len(theirs)
    torch.testing.assert_close(pixels, theirs, atol=2e-6, rtol=0)


@pytest.mark.parametrize("size", PHOTOGRAPHS)
def test_views_have_the_pixels_of_internvl(size, tmp_path):
    module = pytest.importorskip(
        "transformers.models.got_ocr2.image_processing_pil_got_ocr2",
        reason="this transformers has no image processor of pillow",
    )
    ours = transform("internvl", 6)
    theirs = module.GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        crop_to_patches=True,
        max_patches=6,
        image_mean=MEAN,
        image_std=STD,
    )(photograph(*size), return_tensors="pt")["pixel_values"]
    tiled = tile(save(photograph(*size), tmp_path / "a.png"), ours)
    torch.testing.assert_close(ours.load_pixels(tiled), theirs, atol=2e-6, rtol=0)


def test_levels_of_views_become_their_pixels(tmp_path):
    given = transform("internvl")
    tiled = tile(save(photograph(120, 50), tmp_path / "a.png"), given)
    levels = given.load_levels(tiled)
    assert levels.shape == (count_views(tiled), 3, SIDE, SIDE) and levels.dtype == torch.uint8
    values = given.level_values()[torch.arange(3)[:, None, None], levels.long()]
    assert torch.equal(values, given.load_pixels(tiled))
    zeros = given.load_pixels(tile(ZeroImage(), given))
    assert not zeros.any() and zeros.shape[1:] == levels.shape[1:]


def test_an_image_is_decoded_once_for_all_its_views(tmp_path, monkeypatch):
    given, calls = transform(), []
    tiled = tile(save(photograph(300, 290), tmp_path / "a.jpg"), given)
    real = image_decoding._convert_rgb
    monkeypatch.setattr(
        image_decoding, "_convert_rgb", lambda image: calls.append(1) or real(image)
    )
    assert len(given.load_levels(tiled)) == 5 and calls == [1]


def test_a_draft_is_as_large_as_the_grid_needs(tmp_path):
    file = save(photograph(800, 600), tmp_path / "a.jpg", quality=95)
    for rule in ("llava_next", "internvl"):
        exact, fast = transform(rule), transform(rule, draft=True)
        tiled = tile(file, fast)
        opened = fast.open_image(tiled)
        needed = fast.tiling.content_size(*tiled.size, tiled.grid, SIDE)
        assert opened.width < 800
        assert opened.width >= needed[0] and opened.height >= needed[1]
        away = (fast.load_levels(tiled).int() - exact.load_levels(tiled).int()).abs()
        assert float(away.float().mean()) < 8


def test_the_hash_of_images_of_one_view_is_what_it_was():
    plain = ImageTransform(SIDE, SIDE, MEAN, STD)
    assert "tiling" not in json.dumps(plain.transform_hash())
    hashes = {plain.transform_hash()}
    for tiles, rule in ((4, "llava_next"), (6, "llava_next"), (4, "internvl")):
        hashes.add(transform(rule, tiles).transform_hash())
    assert len(hashes) == 4
    assert "cut into up to 4 tiles (llava_next, padded) and a thumbnail" in transform().describe()


class OneRecord:
    name = "records"

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read_image(self, index: int, number: int, most: int | None = None) -> bytes:
        return self.data[:most]


def lazy_images(data: bytes, folder: Path) -> list[object]:
    """Return the image with these bytes as a file, in a record and in a tar file."""
    (folder / "image").write_bytes(data)
    with tarfile.open(folder / "a.tar", "w") as tar:
        member = tarfile.TarInfo("a.jpg")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    in_tar = TarImage(str(folder / "a.tar"), "a.jpg", 512, len(data))
    return [ImageFile(folder / "image"), EmbeddedImage(OneRecord(data), 0, 0), in_tar]


def file_bytes(kind: str, orientation: int, mode: str = "RGB", noisy: bool = False) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = photograph(600, 500) if noisy else photograph(60, 41)
    if noisy:
        noise = np.random.default_rng(0).integers(0, 255, (500, 600, 3), np.uint8)
        picture = Image.fromarray(noise)
    buffer = io.BytesIO()
    picture.convert(mode).save(buffer, kind, exif=exif.tobytes())
    return buffer.getvalue()


@pytest.mark.parametrize("exif", [False, True])
@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize(
    ("kind", "mode", "noisy"),
    [("JPEG", "RGB", False), ("JPEG", "L", True), ("PNG", "P", False), ("PNG", "RGB", True),
     ("WEBP", "RGB", True), ("TIFF", "RGB", False), ("TIFF", "L", False)],
)  # fmt: skip
def test_a_header_has_the_size_of_the_opened_image(kind, mode, noisy, orientation, exif, tmp_path):
    data = file_bytes(kind, orientation, mode, noisy)
    assert not noisy or len(data) > HEADER_BYTES
    for image in lazy_images(data, tmp_path):
        opened = ImageTransform(SIDE, SIDE, MEAN, STD, exif=exif).open_image(image)
        assert read_image_size(image, exif) == opened.size


def test_images_without_a_header_are_as_large_as_they_open():
    scene = make_scene("tiles", 0, 1)
    blank = blank_image(scene, MEAN)
    assert read_image_size(scene) == scene.open().size == read_image_size(blank)
    assert read_image_size(ZeroImage()) == (1, 1)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty"), (b"no image at all", "not an image"),
     (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
     (file_bytes("PNG", 1)[:20], "cut off")],
)  # fmt: skip
def test_a_header_that_cannot_be_read_names_the_image(data, reason, tmp_path):
    for image in lazy_images(data, tmp_path):
        with pytest.raises(UserError, match=reason) as raised:
            read_image_size(image)
        assert image.name in str(raised.value)


def test_an_image_of_too_many_pixels_is_refused_by_its_header(tmp_path, monkeypatch):
    file = save(photograph(60, 50), tmp_path / "a.png")
    monkeypatch.setattr(image_decoding, "MAX_DECODING_BYTES", 1000)
    with pytest.raises(UserError, match="too large"):
        read_image_size(file)


def test_the_rules_need_no_torch():
    for name in ("image_tiling", "view_layout", "image_size", "view_pixels"):
        text = Path(importlib.import_module(f"vlbench.data.{name}").__file__).read_text()
        assert "import torch" not in text and "from torch" not in text
