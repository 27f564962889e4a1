"""`check` of tiled images: views are counted, and the page shows what the model reads."""

from __future__ import annotations

import pytest
from PIL import Image
from test_tiled_costs import TILED, write_pictures

from vlbench.__main__ import main
from vlbench.check.supervision_audit import split_into_spans
from vlbench.config import recipe as recipes
from vlbench.data.image_processing import ImageFile
from vlbench.data.sample import IMAGE_PLACEHOLDER, ChatTurn, Sample
from vlbench.planner.meta_model import build_meta_vlm


def test_views_are_counted_and_too_many_refused_by_name(tmp_path, capsys):
    words = [*TILED, *write_pictures(tmp_path)]
    assert main(["check", *words, f"out={tmp_path / 'all'}"]) == 0
    said = capsys.readouterr().out
    assert "views of an image: 4 on average; 3 (33%), 4 (33%), 5 (33%)" in said
    assert "positions: " in (tmp_path / "all/audit.html").read_text()
    few = ["vision.tiling.max_views=4", f"out={tmp_path / 'few'}"]
    assert main(["check", *words, *few]) == 2  # bad samples stop training, unless it says otherwise
    said = capsys.readouterr().out
    assert "views of an image: 3.5 on average; 3 (50%), 4 (50%)" in said
    assert "0 (record 1): has 5 views of its images, and vision.tiling.max_views is 4" in said
    assert "refused: 2 " in said


@pytest.mark.parametrize("tags", ["newline", "none", "numbered"])
def test_every_position_of_an_image_is_in_a_span(tags, tmp_path):
    recipe = recipes.load_recipe([*TILED, f"vision.tiling.tags={tags}"])
    processor = build_meta_vlm(recipe.model, "chat", recipe.stages["chat"], "float32").processor
    Image.new("RGB", (300, 100)).save(tmp_path / "a.png")
    inside = ImageFile(tmp_path / "a.png", str(tmp_path))
    outside = ImageFile(tmp_path / "a.png", str(tmp_path / "other"), allow_outside=True)
    turns = (
        ChatTurn("human", f"{IMAGE_PLACEHOLDER}{IMAGE_PLACEHOLDER}\nWhat?"),
        ChatTurn("assistant", "Red."),
    )
    encoded = processor.sample_encoder().encode(Sample("x", turns, (inside, outside)))
    spans = list(split_into_spans(encoded, processor.tokenizer.decode, processor.transform))
    assert sum(span.position_count for span in spans) == len(encoded.input_ids)
    shown = [span for span in spans if span.kind == "image"]
    assert sum(span.position_count for span in shown) == sum(encoded.image_lengths or [])
    assert len(shown) == (encoded.view_count if tags == "numbered" else 2)
    assert [bool(span.image_uri) for span in shown] == [True] + [False] * (len(shown) - 1)
    assert "is not shown" in shown[-1].text  # it lies outside of the folder
