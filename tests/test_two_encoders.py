"""Two vision encoders at once: features, pixels, training, resume, kept features and exports."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import interpolate
from whole_model_cost import count_model_cost

import vlbench
from vlbench.__main__ import main
from vlbench.config.recipe import load_recipe
from vlbench.data.image_processing import ImageTransform
from vlbench.data.packing import normalize_levels
from vlbench.errors import UserError
from vlbench.model.paired_encoder import PairedEncoder
from vlbench.model.vision_encoder import build_vision_encoder
from vlbench.train import checkpoint_files

SECOND = "vision.second.name=tiny_eva"
SHORT = ["fit", "recipe=yivl_llava", "only=chat"]
SHORT += ["stages.chat.global_batch_size=2", "stages.chat.image_size=56"]
SHORT += ["log.questions=1", "log.examples=0", "log.tensorboard=false", "data.samples=6"]
SHORT += ["trainer.checkpoint_every=0.001", "trainer.keep_last_checkpoints=9"]
BOTH = ["stages.chat.train.second_vision.lr=1e-4"]
NONE = ["stages.chat.train.vision=null"]


def tiny_pair(second_size: int | None = None) -> PairedEncoder:
    first = build_vision_encoder("tiny", "embedded").eval()
    return PairedEncoder(first, build_vision_encoder("tiny_eva", "embedded").eval(), second_size)


def alone(name: str, side: int, class_token: bool) -> torch.nn.Module:
    encoder = build_vision_encoder(name, "embedded").eval()
    encoder.set_image_size(side)
    encoder.read_blocks((), class_token)
    return encoder


def test_a_connector_that_reads_several_blocks_has_them_of_both():
    pair, pixels = tiny_pair(), torch.randn(1, 6, 56, 56)
    pair.set_image_size(56)
    pair.read_blocks((0, -1), False)
    with torch.no_grad():
        levels = pair(pixels)
        for place, level in zip((0, -1), levels, strict=True):
            for number, name in enumerate(("tiny", "tiny_eva")):
                one = alone(name, 56, False)
                one.read_blocks((place,), False)
                half = one(pixels[:, 3 * number : 3 * number + 3])[0]
                assert half.equal(level.chunk(2, dim=-1)[number])


def test_where_a_connector_reads_the_layer_of_the_first_it_reads_that_of_the_second():
    first = build_vision_encoder("tiny", "embedded", -2)
    pair = PairedEncoder(first, build_vision_encoder("tiny_eva", "embedded", -1))
    count = len(pair.second.blocks())
    for layers, second in (((), (-1,)), ((-2, 0, -1), (-1, -len(pair.blocks()), -1))):
        pair.read_blocks(layers, False)
        assert pair.second.output_blocks == tuple(block % count for block in second)


@pytest.mark.parametrize("class_token", [False, True])
def test_features_are_those_of_each_encoder_joined_by_channel(class_token):
    pair = tiny_pair()
    pair.set_image_size(112)
    pair.read_blocks((), class_token)
    pixels = torch.randn(2, 6, 112, 112)
    with torch.no_grad():
        first = alone("tiny", 112, class_token)(pixels[:, :3])
        second = alone("tiny_eva", 112, class_token)(pixels[:, 3:])
        assert pair(pixels).equal(torch.cat([first, second], dim=-1))
    assert pair.feature_width == first.shape[-1] + second.shape[-1]
    assert pair.state_dict().keys() == alone("tiny", 112, False).state_dict().keys()


def test_the_second_encoder_may_see_the_image_at_its_own_size():
    pair = tiny_pair(second_size=84)
    for side in (56, 112):
        pair.set_image_size(side)
        assert pair.second.image_size == 84 and pair.pixel_shape == (
            6,
            max(side, 84),
            max(side, 84),
        )
    pixels = torch.randn(1, 6, 112, 112)
    with torch.no_grad():
        features = pair(pixels)
        second = alone("tiny_eva", 84, False)(pixels[:, 3:, :84, :84])
    rows = pair.second.grid[0]
    maps = second.transpose(1, 2).unflatten(2, (rows, rows))
    maps = interpolate(maps, pair.grid, mode="bilinear").flatten(2).transpose(1, 2)
    assert features[..., -second.shape[-1] :].equal(maps)
    with pytest.raises(UserError, match=r"vision\.second: image_size is 85"):
        tiny_pair(second_size=85).set_image_size(56)


def test_pixels_are_two_transforms_of_one_image():
    """The square is the first encoder's, so that the grids lie on each other."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 90, 3), np.uint8))
    statistics = {"mean": (0.2, 0.3, 0.4), "std": (0.5, 0.6, 0.7)}
    second = ImageTransform(84, 84, **statistics, interpolation="bilinear")
    first = ImageTransform(56, 56, (0.5,) * 3, (0.5,) * 3)
    both = ImageTransform(56, 56, (0.5,) * 3, (0.5,) * 3, second=second)
    pixels = both(image)
    assert pixels.shape == (6, 84, 84)
    assert pixels[:3, :56, :56].equal(first(image)) and pixels[3:].equal(second(image))

    class Opened:
        name = "image"

        def open(self) -> Image.Image:
            return image

    levels = both.load_levels(Opened())
    assert normalize_levels(levels, both.level_values())[3:].equal(second(image))
    assert both.transform_hash() != first.transform_hash()
    pair = tiny_pair(second_size=84)
    pair.set_image_size(56)
    assert pair.transform.second.pad == pair.transform.pad and pair.transform.second.crop == 84


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint_files.find_checkpoint(folder) / "model.safetensors")


def fit(folder: Path, *words: str) -> dict[str, torch.Tensor]:
    assert main([*SHORT, "stages.chat.steps=3", *words, f"run={folder}"]) == 0
    return weights(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which both encoders are trained."""
    folder = tmp_path_factory.mktemp("pair") / "run"
    fit(folder, SECOND, *BOTH)
    return folder


def test_both_are_trained_saved_exported_and_loaded(trained, tmp_path, capsys):
    saved = weights(trained)
    for part, name in (("vision", "tiny"), ("second_vision", "tiny_eva")):
        begun = build_vision_encoder(name, "embedded").state_dict()
        here = {key for key in saved if key.startswith(f"{part}.")}
        assert {f"{part}.{key}" for key in begun} == here
        assert any(not torch.equal(begun[k.removeprefix(f"{part}.")], saved[k]) for k in here)
    assert main(["export", f"model={trained}", f"out={tmp_path / 'out'}", "format=vlbench"]) == 0
    for folder in (trained, tmp_path / "out"):
        vlm = vlbench.load(folder)
        assert all(vlm.model.state_dict()[key].equal(value) for key, value in saved.items())
        assert vlm.model.shapes.vision_width == vlm.vision.feature_width
    capsys.readouterr()
    for layout in ("yi_vl", "hf_llava"):
        words = [f"model={trained}", f"out={tmp_path / layout}", f"format={layout}"]
        assert main(["export", *words]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and "two vision encoders" in line and "format=vlbench" in line


def test_a_resumed_run_is_the_run_bit_for_bit(trained, tmp_path):
    folder = Path(shutil.copytree(trained, tmp_path / "cut"))
    (folder / "results.json").unlink()
    checkpoints = sorted((folder / "checkpoints").iterdir())
    for later in checkpoints[1:]:
        shutil.rmtree(later)
    again, whole = fit(folder, SECOND, *BOTH), weights(trained)
    assert again.keys() == whole.keys()
    assert all(again[key].equal(whole[key]) for key in whole)


@pytest.mark.slow
def test_what_is_frozen_is_in_no_checkpoint_and_may_be_kept_as_features(tmp_path, capsys):
    # an EVA's features depend on which images are computed together, by the last bit
    words = [*NONE, "vision.second.name=tiny", "vision.second.image_size=84"]
    plain = fit(tmp_path / "plain", *words)
    assert {name.split(".")[0] for name in plain} == {"connector", "language"}
    for folder in ("first", "again"):  # the second time nothing is computed
        cached = fit(tmp_path / folder, *words, f"trainer.feature_cache={tmp_path / 'cache'}")
        assert all(plain[key].equal(cached[key]) for key in plain)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1
    vlm = vlbench.load(tmp_path / "plain")
    assert [name for name, _ in vlm.model.named_parts()][1] == "second_vision"


@pytest.mark.slow
def test_a_run_that_begins_with_one_has_both(trained, tmp_path, capsys):
    words = [*SHORT, f"init={trained}", "stages.chat.steps=0"]
    assert main([*words, f"run={tmp_path / 'next'}"]) == 0
    before, after = weights(trained), weights(tmp_path / "next")
    assert all(after[key].equal(before[key]) for key in before)
    assert main([*words, "vision.second.name=tiny", f"run={tmp_path / 'other'}"]) == 2
    assert "brings its own vision encoder" in capsys.readouterr().err


def test_a_part_that_is_not_there_cannot_be_trained():
    with pytest.raises(UserError, match=r"train\.second_vision and no second vision encoder"):
        load_recipe(["recipe=yivl_llava", *BOTH])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layer=9"], "vision.second.layer is 9; this vision encoder has 5 blocks"),
        (["weights=openai"], "vision.second.weights is 'openai'; vision.second.name=tiny_eva "),
        (["image_size=85"], "vision.second: image_size is 85"),
    ],
)
def test_errors_name_the_keys_of_the_second(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*SHORT, SECOND, *(f"vision.second.{word}" for word in words)]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_the_planner_counts_both():
    from vlbench.model.train_flops import count_step_flops
    from vlbench.planner.meta_model import build_meta_vlm

    flops = {}
    for words in ([], ["vision.second.name=tiny_eva"]):
        recipe = load_recipe(["recipe=yivl_llava", *words])
        stage = recipe.stages["chat"]
        vlm = build_meta_vlm(recipe.model, "chat", stage, "32").model
        flops[len(words)] = count_step_flops(vlm).per_view_encoding
        assert count_model_cost(recipe.model, 56).tokens == vlm.connector.tokens_per_image // 4
    assert flops[1] > 1.25 * flops[0]  # the second is frozen
    behind_gradients = []
    for encoder in vlm.vision.encoders():
        vlm.requires_grad_(False)
        encoder.requires_grad_(True)
        counted = count_step_flops(vlm)
        behind_gradients.append(counted.per_view - counted.per_view_encoding)
    assert behind_gradients[0] == behind_gradients[1]  # the connector passes gradients on to either
