"""Models of tiled images train alike however their samples are packed, cut, shared and resumed."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from random_vlm import SMALL, NoiseImage, make_batch, make_sample, open_gates, small_vlm
from row_gradients import learn, two_process_differences
from safetensors.torch import load_file
from torch import Tensor

import vlbench
from vlbench.__main__ import main
from vlbench.config.recipe import load_recipe
from vlbench.connector import registry
from vlbench.data.filler_batches import empty_batch
from vlbench.data.image_tiling import ImageTiling
from vlbench.data.sample import Sample
from vlbench.data.view_layout import ViewSettings
from vlbench.errors import UserError
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.view_tokens import newline_of
from vlbench.train import checkpoint_files

SIZES = ((60, 20), (28, 28), (30, 90), (56, 60))
"""Of images in pixels; a view has 28."""
SETTINGS = {
    "newline": ViewSettings(ImageTiling(4), "newline"),
    "numbered": ViewSettings(ImageTiling(4, "internvl"), "numbered"),
    "none": ViewSettings(ImageTiling(3, thumbnail=False), "none"),
}
SHORT = (
    "fit", "recipe=yivl_llava", "only=chat", "stages.chat.image_size=56", "stages.chat.steps=3",
    "stages.chat.global_batch_size=4", "log.every_n_steps=1", "log.questions=1", "log.examples=0",
    "log.tensorboard=false", "trainer.checkpoint_every=0.001", "trainer.keep_last_checkpoints=9",
)  # fmt: skip
TILES = ("vision.tiling.tiles=4", "vision.max_visual_tokens=80")


def tiled_vlm(tags: str = "newline", connector: str = "llava_mlp") -> LoadedVLM:
    vlm = small_vlm(registry.load_connector(connector), SMALL.get(connector), SETTINGS[tags])
    vlm.vision.requires_grad_(False)
    for parameter in vlm.vision.used_parameters():  # DDP waits for a gradient of all others, too
        parameter.requires_grad_(True)
    return vlm


def tiled_sample(number: int, images: int = 1) -> Sample:
    """Return a conversation whose images differ in size."""
    sample = make_sample(number, images)
    sized = [NoiseImage(one.seed, SIZES[one.seed % len(SIZES)]) for one in sample.images]
    return replace(sample, images=tuple(sized))


SAMPLES = [
    tiled_sample(1),
    tiled_sample(2, 2),
    tiled_sample(3, 0),
    tiled_sample(14),
    tiled_sample(5),
]


def assert_same(found: tuple[float, dict], expected: tuple[float, dict], near: float) -> None:
    assert found[0] == pytest.approx(expected[0], rel=near)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        away = float((found[1][name] - value).abs().max())
        assert away <= near * max(1e-3, float(value.abs().max())), name


@pytest.mark.parametrize(
    "tags",
    ["newline", *(pytest.param(tags, marks=pytest.mark.slow) for tags in ("numbered", "none"))],
)
def test_packed_alone_and_in_another_order_learn_the_same(tags):
    expected = learn(tiled_vlm(tags), [SAMPLES])
    assert ("connector.image_newline" in expected[1]) == (tags == "newline")
    for rows in ([[one] for one in SAMPLES], [SAMPLES[::-1]], [SAMPLES[3:], SAMPLES[:3]]):
        assert_same(learn(tiled_vlm(tags), rows), expected, 1e-9)


def test_a_row_of_a_batch_does_not_see_another():
    vlm = tiled_vlm()
    together = make_batch(vlm, [SAMPLES[:2], SAMPLES[3:]])
    together.labels = None
    with torch.no_grad():
        logits = vlm(together).logits
        for row, samples in enumerate((SAMPLES[:2], SAMPLES[3:])):
            alone = make_batch(vlm, [samples])
            alone.labels = None
            torch.testing.assert_close(
                logits[row, : alone.input_ids.shape[1]], vlm(alone).logits[0], atol=1e-5, rtol=1e-5
            )


def test_pixels_of_a_tile_reach_its_own_positions_alone():
    vlm = tiled_vlm("none").eval()
    batch = make_batch(vlm, [[tiled_sample(14), tiled_sample(2, 2)]])
    positions = batch.find_image_positions()
    with torch.no_grad():
        before = vlm.model.merge_embeddings(batch, vlm.visual(batch))[0]
        changed = replace(batch, pixels=batch.pixels.clone())
        changed.pixels[2] += 1
        after = vlm.model.merge_embeddings(changed, vlm.visual(changed))[0]
    moved = (before != after).any(-1).nonzero()[:, 0]
    assert torch.equal(moved, positions[batch.visual_index // 4 == 2])


def test_a_batch_without_images_gives_the_newline_a_gradient():
    vlm = tiled_vlm()
    for batch in (make_batch(vlm, [[SAMPLES[2]]]), empty_batch()):
        vlm(batch).loss_sum.backward()
        assert newline_of(vlm.connector).grad is not None


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["sharded", "replicated"])
@pytest.mark.parametrize("connector", ["llava_mlp", "flamingo", "cross_attention"])
def test_two_processes_have_the_gradients_of_one(wrap, connector):
    """Each has its own samples; one has text alone in its second micro-batch."""
    shares = [[SAMPLES[:2], [SAMPLES[2]]], [[SAMPLES[3]], [SAMPLES[4]]]]
    found = two_process_differences(
        lambda: open_gates(tiled_vlm(connector=connector)), shares, wrap, {"": 1e-8}
    )
    assert found == [[], []]


def test_a_new_image_size_keeps_the_newline():
    vlm = small_vlm(registry.load_connector("c_abstractor"), {"side": 1, "depth": 1, "width": 16},
                    SETTINGS["newline"])  # fmt: skip
    before = newline_of(vlm.connector).detach().clone()
    vlm.set_image_size(56)
    assert torch.equal(newline_of(vlm.connector), before)
    assert vlm.processor.view_layout.side == 56
    assert vlm.processor.transform.tiling == SETTINGS["newline"].tiling


def fit(folder: Path, *words: str) -> dict[str, Tensor]:
    assert main([*SHORT, *TILES, *words, f"run={folder}"]) == 0
    return weights(folder)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(checkpoint_files.find_checkpoint(folder) / "model.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of tiled scenes."""
    folder = tmp_path_factory.mktemp("tiled") / "run"
    fit(folder)
    return folder


@pytest.mark.slow
def test_a_checkpoint_tiles_as_its_training_did(trained):
    checkpoint = checkpoint_files.find_checkpoint(trained)
    written = json.loads((checkpoint / "preprocess.json").read_text())
    tiling = {"tiles": 4, "grid": "llava_next", "thumbnail": True, "grids": []}
    assert written["views"]["tiling"] == tiling
    assert written["views"]["max_visual_tokens"] == 80
    vlm = vlbench.load(trained)
    assert vlm.processor.view_settings == ViewSettings(ImageTiling(4), "newline", None, 80)
    assert newline_of(vlm.connector).equal(weights(trained)["connector.image_newline"])
    picture = Image.effect_noise((150, 60), 80)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "what?"}]
    batch = vlm.prepare([{"role": "user", "content": content}])
    assert len(batch.visual_index) <= 80 and len(batch.pixels) == batch.view_bounds[-1] > 1
    assert isinstance(vlm.chat([{"role": "user", "content": content}], max_new_tokens=3), str)


@pytest.mark.slow
def test_images_views_and_reduced_samples_are_counted_to_the_report(trained):
    seen = json.loads((checkpoint_files.find_checkpoint(trained) / "position.json").read_text())[
        "seen"
    ]
    assert 0 < seen["reduced_samples"] <= seen["samples"] == 12
    budget = json.loads((trained / "results.json").read_text())["budget"]
    assert budget["reduced_samples"] == seen["reduced_samples"]
    assert (budget["images"], budget["views"]) == (seen["images"], seen["views"])
    assert 12 <= budget["images"] < budget["views"]
    rows = csv.DictReader((trained / "metrics.csv").read_text().splitlines())
    assert all(float(row["images_per_second"]) < float(row["views_per_second"]) for row in rows)


@pytest.mark.slow
def test_a_resumed_run_is_the_run_bit_for_bit(trained, tmp_path, capsys):
    folder = Path(shutil.copytree(trained, tmp_path / "cut"))
    (folder / "results.json").unlink()
    for later in sorted((folder / "checkpoints").iterdir())[1:]:
        shutil.rmtree(later)
    again, whole = fit(folder), weights(trained)
    told = capsys.readouterr()
    assert "views of an image: " in told.out and "image positions a sample" in told.out
    assert "samples have fewer tiles than they could, for vision.max_visual_tokens" in told.err
    assert again.keys() == whole.keys()
    assert all(again[key].equal(whole[key]) for key in whole)


@pytest.mark.slow
def test_a_run_that_begins_with_one_is_tiled_as_it_was(trained, tmp_path):
    others = [word for word in SHORT if "chat.steps" not in word]
    words = [*others, f"init={trained}", "stages.chat.steps=0", f"run={tmp_path / 'next'}"]
    assert main(words) == 0
    recipe = load_recipe([f"recipe={tmp_path / 'next' / 'recipe.yaml'}"])
    assert recipe.vision.tiling.tiles == 4 and recipe.vision.max_visual_tokens == 80
    after, before = weights(tmp_path / "next"), weights(trained)
    assert all(after[key].equal(before[key]) for key in before)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vision.max_visual_tokens=64"], "no tiles to reduce: give vision.tiling.tiles"),
        (["vision.tiling.tiles=65"], "vision.tiling.tiles"),
        (["vision.tiling.grid=anyres"], "llava_next"),
        (["vision.tiling.tag=none"], "Did you mean"),
        (["vision.tiling.tiles=4", "vision.second.name=tiny"], "has tiling and second"),
        (["recipe=yivl_blip2", "vision.tiling.tiles=4"], "objective=blip2, which compares"),
    ],
)  # fmt: skip
def test_what_cannot_be_tiled_is_refused_before_anything_is_loaded(words, message):
    recipe = [] if words[0].startswith("recipe") else ["recipe=yivl_llava"]
    with pytest.raises(UserError, match=message) as raised:
        load_recipe([*recipe, *words])
    assert "\n" not in str(raised.value)
