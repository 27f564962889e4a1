"""A tiled model in transformers' LLaVA-NeXT: the same pixels, ids and logits, and back again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_release import edit_json, make_plain_llava, rewrite_weights
from PIL import Image
from test_hf_llava import same_files
from test_siglip_llava import siglip_vlm
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

import vlbench
from vlbench.__main__ import main
from vlbench.config import recipe as recipes
from vlbench.connector import registry
from vlbench.data.image_tiling import ImageTiling
from vlbench.data.sample_encoding import IMAGE_TOKEN_INDEX
from vlbench.data.view_layout import ViewSettings
from vlbench.errors import UserError
from vlbench.model.build_vlm import read_view_settings, release_overrides, view_keys
from vlbench.model.loaded_vlm import LoadedVLM, assemble_vlm
from vlbench.model.weights.export_hf_llava_next import write_hf_llava_next
from vlbench.model.weights.load_release import load_release
from vlbench.train.resume import inherited_keys

SIZES = ((90, 60), (30, 200), (64, 64), (5, 7), (301, 41), (57, 56))
"""Widths and heights of images, in pixels; a tile has 56 or 64."""
PUBLISHED = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
LLAVA_NEXT = ViewSettings(ImageTiling(4))


def tiled_vlm(vlm: LoadedVLM, settings: ViewSettings) -> LoadedVLM:
    """Return a model with the encoder and language model of `vlm` and a new connector for tiles."""
    torch.manual_seed(1)
    return assemble_vlm(
        vlm.vision,
        registry.load_connector("llava_mlp"),
        {"depth": 2, "norm": False},
        vlm.language,
        vlm.tokenizer,
        vlm.processor.template,
        4096,
        settings,
    ).eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_plain_llava(tmp_path_factory.mktemp("next") / "source")


@pytest.fixture(scope="module")
def clip(source: Path) -> LoadedVLM:
    """A small CLIP with the projector and language model of a plain LLaVA."""
    return vlbench.load(source, dtype="float32", device="cpu", template="yi_vl")


def written(vlm: LoadedVLM, folder: Path) -> Path:
    folder.mkdir()
    write_hf_llava_next(vlm, folder, None)
    return folder


def noise(size: tuple[int, int]) -> Image.Image:
    values = torch.Generator().manual_seed(size[0])
    pixels = torch.randint(0, 256, (*size[::-1], 3), generator=values, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def asked(*images: Image.Image) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]


@torch.no_grad()
def same_as_transformers(vlm: LoadedVLM, folder: Path, images: list[Image.Image]) -> None:
    """Compare pixels, ids and logits of a conversation about `images`."""
    batch = vlm.prepare(asked(*images))
    theirs: Any = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor: Any = AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    text = processor.apply_chat_template(asked(*images))
    inputs = processor(images=images, text=text, return_tensors="pt")
    assert batch.view_bounds is not None
    counts = batch.view_bounds.diff().tolist()
    pixels = [views[:count] for views, count in zip(inputs["pixel_values"], counts, strict=True)]
    assert torch.equal(torch.cat(pixels), batch.pixels)
    ids = inputs["input_ids"].masked_fill(
        inputs["input_ids"] == processor.image_token_id, IMAGE_TOKEN_INDEX
    )
    assert torch.equal(ids, batch.input_ids)
    ours = vlm(batch).logits
    logits = theirs.eval()(**inputs).logits[..., : ours.shape[-1]]
    assert (logits - ours).abs().max() <= 1e-5 * ours.abs().max()
    others = vlm.prepare(asked(*images[::-1]))
    assert not torch.equal(vlm(others).logits[0, -1], ours[0, -1])  # the pictures matter


@pytest.mark.parametrize("encoder", ["clip", "siglip"])
def test_transformers_computes_the_same_and_it_comes_back(encoder, clip, source, tmp_path):
    vlm = tiled_vlm(clip if encoder == "clip" else siglip_vlm(source), LLAVA_NEXT)
    folder = written(vlm, tmp_path / "to")
    images = [noise(size) for size in SIZES]
    same_as_transformers(vlm, folder, images)
    back = vlbench.load(folder, dtype="float32", device="cpu", template="yi_vl")
    assert back.processor.view_settings == LLAVA_NEXT
    batch = back.prepare(asked(*images))
    again = back(batch).logits[..., : vlm.language.config.vocab_size]
    assert torch.equal(again, vlm(vlm.prepare(asked(*images))).logits)


def test_the_grids_of_published_folders_are_read(clip, tmp_path):
    folder = written(tiled_vlm(clip, LLAVA_NEXT), tmp_path / "to")
    side = clip.processor.transform.crop
    pinpoints = [[rows * side, columns * side] for rows, columns in PUBLISHED]
    edit_json(folder / "config.json", image_grid_pinpoints=pinpoints)
    file = folder / "processor_config.json"
    config = json.loads(file.read_text())
    config["image_processor"]["image_grid_pinpoints"] = pinpoints
    file.write_text(json.dumps(config))
    vlm = vlbench.load(folder, dtype="float32", device="cpu", template="yi_vl")
    assert vlm.processor.view_settings == ViewSettings(ImageTiling(4, grids=tuple(PUBLISHED)))
    # a strip of one row and four columns, which the published grids do not have
    same_as_transformers(vlm, folder, [noise((301, 41)), noise((90, 60))])


def test_tiles_are_resized_as_the_image_processor_says(clip, tmp_path):
    folder = written(tiled_vlm(clip, LLAVA_NEXT), tmp_path / "hf")
    config = json.loads((folder / "processor_config.json").read_text())
    config["image_processor"]["resample"] = 2  # bilinear
    edit_json(folder / "processor_config.json", **config)
    back = vlbench.load(folder, dtype="float32", device="cpu")
    assert back.processor.transform.interpolation == "bilinear"
    same_as_transformers(back, written(back, tmp_path / "again"), [noise(size) for size in SIZES])


def test_an_export_goes_out_again_the_same_and_names_of_transformers_4_are_read(clip, tmp_path):
    folder = written(tiled_vlm(clip, LLAVA_NEXT), tmp_path / "to")
    words = [f"model={folder}", "template=yi_vl"]
    for name in ("once", "twice"):
        to = tmp_path / name
        assert main(["export", *words, f"out={to}", "format=hf_llava_next"]) == 0
        words = [f"model={to}"]
    same_files(tmp_path / "once", tmp_path / "twice")
    before = vlbench.load(folder, template="yi_vl").connector.image_newline

    def rename(state: dict[str, torch.Tensor]) -> None:
        newline = "model.image_newline" if "model.image_newline" in state else "image_newline"
        state["image_newline"] = state.pop(newline)

    rewrite_weights(folder, rename, "safetensors")
    assert torch.equal(vlbench.load(folder, template="yi_vl").connector.image_newline, before)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (ViewSettings(ImageTiling(4), "none"), "tags=none"),
        (ViewSettings(ImageTiling(4), "numbered"), "tags=numbered"),
        (ViewSettings(ImageTiling(4, "internvl")), "grid=internvl"),
        (ViewSettings(ImageTiling(4, thumbnail=False)), "thumbnail=false"),
        (ViewSettings(ImageTiling(1)), "tiles=1"),
        (None, "has no vision.tiling; format=hf_llava"),
    ],
)
def test_another_tiling_is_refused(settings, said, clip, tmp_path):
    vlm = tiled_vlm(clip, settings) if settings else clip
    with pytest.raises(UserError, match=said) as error:
        write_hf_llava_next(vlm, tmp_path, None)
    assert len(error.value.lines) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("pinpoints", "said"),
    [
        ([[56, 56], [56, 112]], "a single tile beside the thumbnail"),
        ([[56, 100]], "multiples of 56"),
        ([[112, 56, 3]], "multiples of 56"),
        ("[[112, 56]]", "multiples of 56"),
    ],
)
def test_other_grids_are_refused(pinpoints, said, clip, tmp_path):
    folder = written(tiled_vlm(clip, LLAVA_NEXT), tmp_path / "to")
    edit_json(folder / "config.json", image_grid_pinpoints=pinpoints)
    with pytest.raises(UserError, match=said):
        vlbench.load(folder, template="yi_vl")


def test_other_layouts_refuse_tiles_and_vlbench_carries_them(clip, tmp_path, capsys):
    settings = replace(LLAVA_NEXT, max_visual_tokens=60)
    folder = written(tiled_vlm(clip, settings), tmp_path / "next")
    for layout in ("yi_vl", "hf_llava", "yi_vl_hf"):
        words = [f"model={folder}", f"out={tmp_path / layout}", f"format={layout}"]
        assert main(["export", *words, "template=yi_vl"]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"(vision.tiling), which format={layout} cannot hold" in error
    own = tmp_path / "own"
    words = [f"model={folder}", f"out={own}", "format=vlbench", "template=yi_vl"]
    assert main(["export", *words]) == 0
    before = vlbench.load(folder, dtype="float32", template="yi_vl")
    after = vlbench.load(own, dtype="float32")
    assert after.processor.view_settings == before.processor.view_settings
    conversation = asked(*map(noise, SIZES[:3]))
    with torch.no_grad():
        ours = after(after.prepare(conversation)).logits
        assert torch.equal(ours, before(before.prepare(conversation)).logits)


def test_training_begins_with_the_tiles_of_a_release_unless_it_says_otherwise(clip, tmp_path):
    folder = written(tiled_vlm(clip, LLAVA_NEXT), tmp_path / "to")
    words = ["recipe=yivl_llava", f"init={folder}", "connector.norm=false"]
    inherited = inherited_keys(recipes.load_recipe(words).model, None)
    assert read_view_settings(recipes.load_recipe(words, inherited).vision) == LLAVA_NEXT
    fewer = recipes.load_recipe([*words, "vision.tiling.tiles=2"], inherited)
    assert read_view_settings(fewer.vision) == ViewSettings(ImageTiling(2))
    whole = recipes.load_recipe([*words, "vision.tiling=null"], inherited)
    vlm = load_release(folder, torch.float32, overrides=release_overrides(whole.model))
    assert vlm.processor.view_settings is None and vlm.processor.transform.squash
    assert not hasattr(vlm.connector, "image_newline")


def test_a_recipe_names_its_grids_in_their_order():
    words = ["recipe=yivl_llava", "vision.tiling.tiles=4", "vision.tiling.grids=[2x1,1x2,2x2]"]
    recipe = recipes.load_recipe(words)
    settings = read_view_settings(recipe.vision)
    assert settings is not None
    assert settings.tiling.list_grids() == ((2, 1), (1, 2), (2, 2))
    assert settings.tiling.list_grids(most_tiles=3) == ((2, 1), (1, 2))
    assert settings.tiling.choose_grid(30, 30, 56) == (2, 1)  # as good as 1x2, and before it
    assert ImageTiling(4).choose_grid(30, 30, 56) == (1, 2)
    assert view_keys(settings)["tiling"] == recipes.to_plain(recipe.vision.tiling)


@pytest.mark.parametrize(
    ("grids", "said"),
    [
        ("[2x3]", "2x3 among its grids"),
        ("[1x1]", "a grid has 2 to 4 tiles"),
        ("[2y2]", "must be ROWSxCOLUMNS"),
        ("[1x2,1x2]", "a grid twice"),
    ],
)
def test_grids_that_cannot_be_are_refused(grids, said):
    words = ["recipe=yivl_llava", "vision.tiling.tiles=4", f"vision.tiling.grids={grids}"]
    with pytest.raises(UserError, match=said):
        recipes.load_recipe(words)
