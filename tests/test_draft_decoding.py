"""`data.decode=draft`: large JPEGs are decoded smaller everywhere, and the hash says so."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from vlbench import load
from vlbench.__main__ import main
from vlbench.data.image_processing import ImageFile, ImageTransform
from vlbench.errors import UserError
from vlbench.evaluate.tasks.benchmark_types import RecordImage

EXACT = ImageTransform(112, 112, (0.5, 0.4, 0.3), (0.25, 0.25, 0.25))
DRAFT = dataclasses.replace(EXACT, draft=True)


@pytest.fixture
def photo(tmp_path):
    """A JPEG of 1600 x 1200 with soft edges."""
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1600, 3), dtype=np.uint8)
    path = tmp_path / "photo.jpg"
    Image.fromarray(noise).filter(ImageFilter.GaussianBlur(12)).save(path, quality=95)
    return path


def test_a_large_jpeg_is_decoded_smaller_but_never_below_what_is_needed(photo):
    assert ImageFile(photo).open().size == (1600, 1200)
    assert ImageFile(photo).open_draft(112).size == (200, 150)
    assert ImageFile(photo).open_draft(900).size == (1600, 1200)
    packed = RecordImage("one", "photo.jpg", photo.read_bytes())
    assert packed.open_draft(112).size == (200, 150)


def test_pixels_are_nearly_the_same_and_those_of_other_files_exactly(photo, tmp_path):
    exact, draft = EXACT.load_pixels(ImageFile(photo)), DRAFT.load_pixels(ImageFile(photo))
    assert exact.shape == draft.shape and not torch.equal(exact, draft)
    assert (exact - draft).abs().max() * 0.25 * 255 <= 8  # levels of 256
    Image.open(photo).save(tmp_path / "photo.png")
    png = ImageFile(tmp_path / "photo.png")
    assert torch.equal(EXACT.load_pixels(png), DRAFT.load_pixels(png))


def test_it_belongs_to_the_hash_and_exact_keeps_the_hash_it_had():
    assert EXACT.transform_hash() != DRAFT.transform_hash()
    assert ImageTransform(56, 56, (0.5,) * 3, (0.5,) * 3).transform_hash() == "7ee96838a1ed8915"


@pytest.mark.parametrize("change", [{"pad": False}, {"pad": False, "squash": True}])
def test_where_it_changes_no_pixel_it_is_not_in_the_hash(change, photo):
    exact, draft = dataclasses.replace(EXACT, **change), dataclasses.replace(DRAFT, **change)
    file = ImageFile(photo)
    assert torch.equal(exact.load_pixels(file), draft.load_pixels(file))
    assert exact.transform_hash() == draft.transform_hash()
    tiled = dataclasses.replace(draft, native=True)
    assert tiled.transform_hash() != dataclasses.replace(tiled, draft=False).transform_hash()


def test_where_it_changes_no_pixel_a_run_says_so_and_older_ones_are_read(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(ImageTransform, "can_draft", False)  # as of an encoder that squashes
    words = ["stages.chat.steps=0", "only=chat", "log.questions=1", "log.examples=0"]
    words += ["log.tensorboard=false", "data.decode=draft"]
    assert main(["fit", "recipe=yivl_llava", *words, f"run={tmp_path / 'run'}"]) == 0
    assert "data.decode=draft has no effect" in capsys.readouterr().out
    transform = load(tmp_path / "run").processor.transform
    [file] = (tmp_path / "run/checkpoints").glob("*/preprocess.json")
    before = transform.transform_hash(counts_idle_draft=True)
    file.write_text(file.read_text().replace(transform.transform_hash(), before))
    assert load(tmp_path / "run").processor.transform.draft
    file.write_text(file.read_text().replace(before, "0" * 16))
    with pytest.raises(UserError, match="trained with other image preprocessing"):
        load(tmp_path / "run")


def test_a_run_keeps_its_way_to_decode(tmp_path):
    words = [f"stages.{name}.steps=0" for name in ("align_224", "align_448", "chat")]
    words += ["log.questions=1", "log.examples=0", "log.tensorboard=false", "data.decode=draft"]
    assert main(["fit", "recipe=yivl_llava", *words, f"run={tmp_path / 'run'}"]) == 0
    vlm = load(tmp_path / "run")
    assert vlm.processor.transform.draft
    said = json.loads(next((tmp_path / "run/checkpoints").glob("*/preprocess.json")).read_text())
    assert said["transform_hash"] == vlm.processor.transform.transform_hash()


def test_one_stage_cannot_decode_otherwise(capsys):
    words = ["stages.chat.data.decode=draft", "stages.chat.data.train=scenes"]
    assert main(["show", "recipe=yivl_llava", *words]) == 2
    assert "a run decodes images in one way" in capsys.readouterr().err
