"""`data.exif`: photographs are turned as their EXIF says, everywhere or nowhere, and it is told."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from golden_release import CHECKPOINT
from PIL import Image
from random_vlm import small_vlm

from vlbench.__main__ import main
from vlbench.compare.report.question_examples import QuestionThumbnails
from vlbench.config.recipe import load_recipe, recipe_to_yaml
from vlbench.connector import registry
from vlbench.data.image_processing import ImageFile, ImageTransform
from vlbench.data.sample import IMAGE_PLACEHOLDER, ChatTurn, Sample
from vlbench.errors import UserError
from vlbench.evaluate.heldout_questions import EvalQuestion, final_questions
from vlbench.evaluate.run_results import pick_examples
from vlbench.train.resume import inherited_keys

PLAIN = ImageTransform(16, 16, (0.5, 0.4, 0.3), (0.25, 0.25, 0.25))
TURNED = dataclasses.replace(PLAIN, exif=True)
ORIENTATION = 0x0112


def photo(path: Path, orientation: int | None, mode: str = "RGB") -> ImageFile:
    """Write an image that is red on its left and blue on its right."""
    image = Image.new("RGB", (20, 10), "red")
    image.paste("blue", (10, 0, 20, 10))
    exif = Image.Exif()
    if orientation:
        exif[ORIENTATION] = orientation
    image.convert(mode).save(path, exif=exif)
    return ImageFile(path)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_an_orientation_is_applied_where_it_is_asked_for(tmp_path, ending, orientation):
    turned = photo(tmp_path / f"a.{ending}", orientation)
    upright = photo(tmp_path / f"b.{ending}", None)
    assert torch.equal(PLAIN.load_levels(turned), PLAIN.load_levels(upright))
    levels = TURNED.load_levels(turned)
    # 3 is half a turn; 6 and 8 are quarter turns, to the right and to the left
    top, left = levels[:, 2, 8].tolist(), levels[:, 8, 2].tolist()
    red, blue = top if orientation == 6 else left, top if orientation == 8 else left
    if orientation == 6:
        assert red[0] > 200 > 60 > red[2]
    else:
        assert blue[2] > 200 > 60 > blue[0]
    assert torch.equal(TURNED.load_levels(upright), PLAIN.load_levels(upright))


def test_a_palette_and_gray_keep_their_orientation(tmp_path):
    for mode in ("P", "L"):
        image = photo(tmp_path / f"{mode}.png", 6, mode)
        assert TURNED.open_image(image).size == (10, 20)


def test_a_png_that_is_called_jpg_is_read_by_what_it_is(tmp_path):
    stream = io.BytesIO()
    Image.new("RGB", (3, 3), "green").save(stream, "PNG")
    (tmp_path / "a.jpg").write_bytes(stream.getvalue())
    assert ImageFile(tmp_path / "a.jpg").open().getpixel((0, 0)) == (0, 128, 0)


def test_it_belongs_to_the_hash_and_ignore_keeps_the_hash_it_had():
    assert PLAIN.transform_hash() != TURNED.transform_hash()
    assert ImageTransform(56, 56, (0.5,) * 3, (0.5,) * 3).transform_hash() == "7ee96838a1ed8915"


def test_broken_exif_is_one_line_or_nothing(tmp_path):
    photo(tmp_path / "a.jpg", 6)
    whole = (tmp_path / "a.jpg").read_bytes()
    start = whole.index(b"Exif\0\0") + 6
    (tmp_path / "a.jpg").write_bytes(whole[:start] + b"\xff" * 8 + whole[start + 8 :])
    image = ImageFile(tmp_path / "a.jpg")
    assert PLAIN.load_levels(image).shape == (3, 16, 16)
    try:
        TURNED.load_levels(image)
    except UserError as error:
        assert "EXIF cannot be read" in str(error) and "\n" not in str(error)


def test_people_are_shown_a_picture_as_the_model_is(tmp_path):
    """In a run's examples, in the report of runs, and beside an answer in a notebook."""
    turned = photo(tmp_path / "a.jpg", 6)
    sample = Sample("1", (ChatTurn("human", f"{IMAGE_PLACEHOLDER}What?"),), (turned,))
    question = EvalQuestion(sample, "red", "", "en")
    for exif, size in ((False, (20, 10)), (True, (10, 20))):
        (example,) = pick_examples([question], ["blue"], 1, exif)
        assert example.images[0].size == size
    vlm = small_vlm(registry.load_connector("linear")).eval()
    assert vlm.ask(turned.path, "What?", max_new_tokens=1).images[0].size == (20, 10)
    vlm.processor = vlm.processor.with_decoding(draft=False, exif=True)
    assert vlm.ask(turned.path, "What?", max_new_tokens=1).images[0].size == (10, 20)


def test_training_goes_on_with_photographs_as_they_were_turned(tmp_path):
    own = tmp_path / "own"
    assert main(["export", f"model={CHECKPOINT}", f"out={own}", "format=vlbench"]) == 0
    text = (own / "recipe.yaml").read_text()
    (own / "recipe.yaml").write_text(
        text.replace("exif: ignore", "exif: apply").replace("decode: exact", "decode: draft")
    )
    words = ["recipe=yivl_llava", f"init={own}", "stages.chat.data.train=scenes"]
    inherited = inherited_keys(load_recipe(words).model, None)
    recipe = load_recipe(words, inherited)
    assert (recipe.data.exif, recipe.data.decode) == ("apply", "draft")
    assert load_recipe([*words, "data.exif=ignore"], inherited).data.exif == "ignore"


def test_the_report_shows_a_picture_as_the_model_saw_it(tmp_path):
    photo(tmp_path / "a.jpg", 6)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    record = {"id": "1", "image": "a.jpg", "conversations": turns}
    (tmp_path / "a.json").write_text(json.dumps([record]))
    for exif, shape in (("ignore", (20, 10)), ("apply", (10, 20))):
        words = [f"data.train={tmp_path / 'a.json'}", f"data.exif={exif}"]
        recipe = load_recipe(["recipe=yivl_llava", "only=chat", *words])
        (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(recipe))
        (question,) = final_questions(recipe.last_stage_data, None)[1]
        name = question.sample.id
        run: Any = SimpleNamespace(folder=tmp_path, answers_and_truths={name: ("", "red")})
        thumbnail = QuestionThumbnails(run).first_thumbnail(name)
        assert thumbnail is not None and (thumbnail.width, thumbnail.height) == shape


def test_the_recipe_tells_the_model_and_stages_may_not_differ(capsys):
    recipe = load_recipe(["recipe=yivl_llava", "data.exif=apply"])
    assert recipe.model.apply_exif and not load_recipe(["recipe=yivl_llava"]).model.apply_exif
    words = ["stages.chat.data.exif=apply", "stages.chat.data.train=scenes"]
    assert main(["show", "recipe=yivl_llava", *words]) == 2
    assert "a run decodes images in one way" in capsys.readouterr().err
