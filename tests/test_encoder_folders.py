"""Folders of vision encoders: their own weights, what is refused, and what is then allowed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import vlbench
from vlbench.__main__ import main
from vlbench.config.recipe import load_recipe
from vlbench.errors import UserError
from vlbench.model.vision_config import EMBEDDED_ENCODERS, resolve_vision_config
from vlbench.model.vision_encoder import build_vision_encoder, check_vision_weights

FIT = ["fit", "recipe=yivl_llava", "only=chat", "stages.chat.steps=1", "run=run"]
FIT += ["stages.chat.global_batch_size=2", "stages.chat.image_size=56", "data.samples=6"]
FIT += ["log.questions=1", "log.examples=0", "log.tensorboard=false"]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder that has `own`, an encoder in open_clip's layout."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(EMBEDDED_ENCODERS["tiny"], "own"))


def write_open_clip(folder: Path, **vision: Any) -> str:
    """Write open_clip's small file into a new folder, without weights; return its path."""
    model = {"embed_dim": 16, "vision_cfg": vision}
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    return str(folder)


@pytest.mark.parametrize("size", ["tiny", "6b"])
@pytest.mark.parametrize("given", [[], ["vision.weights=embedded"], ["vision.weights=own"]])
def test_a_folder_has_its_own_weights_in_every_size(given, size, own):
    found = load_recipe(["recipe=yivl_llava", f"size={size}", "vision.name=own", *given]).vision
    assert (found.name, found.weights) == ("own", "own")
    random = load_recipe(["recipe=yivl_llava", "vision.name=own", "vision.weights=random"])
    assert random.vision.weights == "random"


def test_a_second_encoder_may_be_a_folder(own):
    found = load_recipe(["recipe=yivl_llava", "vision.second.name=own"]).vision
    assert found.second is not None and found.second.weights == "own"
    assert found.weights == "embedded"


def test_a_name_of_open_clip_is_no_folder_of_a_clip_beside_it(own):
    Path("ViT-L-14").mkdir()
    Path("ViT-L-14/config.json").write_text("{}")
    words = ["recipe=yivl_llava", "vision.name=ViT-L-14"]
    with pytest.raises(UserError, match="none of vision.name=ViT-L-14 are in this package"):
        load_recipe(words)
    Path("config.json").write_text("{}")  # the working folder is no vision encoder
    assert load_recipe(["recipe=yivl_llava", "size=6b"]).vision.weights != "embedded"


def test_a_run_begins_with_the_weights_of_a_folder(own, capsys):
    frozen = "stages.chat.train.vision=null"
    assert main([*FIT, "vision.name=own", "vision.weights=embedded", frozen]) == 0
    assert "vision own -> connector" in capsys.readouterr().out
    state = vlbench.load("run").vision.visual.state_dict()
    tiny = build_vision_encoder("tiny", "embedded").visual.state_dict()
    assert state.keys() == tiny.keys() and all(state[key].equal(tiny[key]) for key in tiny)


def test_a_checkpoint_of_a_trained_encoder_stands_without_its_folder(own):
    assert main([*FIT, "vision.name=own"]) == 0
    before = vlbench.load("run").vision.visual.state_dict()
    shutil.rmtree("own")
    after = vlbench.load("run").vision.visual.state_dict()
    assert all(after[key].equal(before[key]) for key in before)


def test_what_a_message_recommends_is_allowed(own, capsys):
    with pytest.raises(UserError, match="only 'embedded' and 'random' are allowed"):
        build_vision_encoder("own", "openai")
    with pytest.raises(UserError, match="say vision.name=own vision.weights=embedded"):
        resolve_vision_config("ViT-S-32", "own")
    assert main(["show", "recipe=yivl_llava", "vision.name=own", "vision.weights=embedded"]) == 0


@pytest.mark.parametrize(
    ("timm_name", "said"),
    [
        ("vit_base_mci_224", "timm_model_name is 'vit_base_mci_224', a FastViT or MobileCLIP"),
        ("vitamin_small_224", "timm_model_name is 'vitamin_small_224', a network of stages"),
        ("vit_base_patch16_225", "which timm .* does not have; a newer one may"),
    ],
)
def test_a_hybrid_in_open_clips_file_is_refused_before_its_weights(timm_name, said, tmp_path):
    folder = write_open_clip(tmp_path / "own", timm_model_name=timm_name, image_size=224)
    for check in (build_vision_encoder, check_vision_weights):
        with pytest.raises(UserError, match=said):
            check(folder, "embedded")


def test_the_miniature_of_eva_may_be_copied(tmp_path):
    folder = shutil.copytree(EMBEDDED_ENCODERS["tiny_eva"], tmp_path / "own")
    assert build_vision_encoder(str(folder), "embedded").image_size == 56


@pytest.mark.parametrize("wrong", [{"patch_size": 0}, {"head_width": 0}, {"image_size": -56}])
def test_a_size_below_one_in_open_clips_file_is_one_line(wrong, tmp_path):
    sizes = {"image_size": 56, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14}
    folder = write_open_clip(tmp_path / "own", **sizes | wrong)
    with pytest.raises(UserError, match=f"vision.name is '{folder}', which cannot be built"):
        build_vision_encoder(folder, "random")


TIMM_ARGS = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 14}


@pytest.mark.parametrize(
    ("args", "pixels", "said"),
    [
        ({"patch_size": 0}, {}, "vision.name is '.*', which cannot be built"),
        ({"num_heads": 0}, {}, "num_heads is 0; wanted is a whole number from 1"),
        ({"num_heads": -1}, {}, "num_heads is -1; wanted is a whole number from 1"),
        ({"patch_size": []}, {}, "vision.name is '.*', which cannot be built"),
        ({"img_size": 13}, {}, "its images of 13 pixels are smaller than a patch"),
        ({}, {"crop_mode": ["center"]}, r"crop_mode is \['center'\]; known are center, squash"),
    ],
)
def test_odd_values_in_timms_file_are_one_line(args, pixels, said, tmp_path):
    square = {"input_size": [3, 56, 56], "mean": [0.5] * 3, "std": [0.5] * 3, **pixels}
    config = {"architecture": "vit_base_patch16_224", "pretrained_cfg": square}
    config["model_args"] = {**TIMM_ARGS, **args}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        build_vision_encoder(str(tmp_path), "random")


RATES = {"drop_path_rate": 0.9, "proj_drop_rate": 0.9, "attn_drop_rate": 0.9, "drop_rate": 0.9}
TIMM_IN_OPEN_CLIP = {
    **{"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "avg", "timm_proj": "linear"},
    **{"image_size": 32, "timm_drop_path": 0.9, "timm_drop": 0.9},
}


@pytest.mark.parametrize("layout", ["timm", "open_clip"])
def test_nothing_is_dropped_at_random_in_training(layout, tmp_path):
    """Published folders keep the rates that they were trained with."""
    folder = tmp_path / "own"
    if layout == "open_clip":
        write_open_clip(folder, **TIMM_IN_OPEN_CLIP)
    else:
        folder.mkdir()
        square = {"input_size": [3, 56, 56], "mean": [0.5] * 3, "std": [0.5] * 3}
        config = {"architecture": "vit_base_patch16_224", "pretrained_cfg": square}
        text = json.dumps({**config, "model_args": {**TIMM_ARGS, **RATES}})
        (folder / "config.json").write_text(text)
    encoder = build_vision_encoder(str(folder), "random").train()
    pixels = torch.randn(1, 3, encoder.image_size, encoder.image_size)
    assert torch.equal(encoder(pixels), encoder(pixels))


@pytest.mark.parametrize(
    ("key", "value"),
    [("rescale_factor", 1.0), ("do_rescale", False), ("do_normalize", None)],
)
def test_an_image_processor_of_other_pixels_is_refused(key, value, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "preprocessor_config.json"
    squares = {"do_resize": False, "do_center_crop": False}  # `vision.name` makes squares
    said = {"resample": 3, "rescale_factor": 1 / 255, **squares}
    file.write_text(json.dumps(said))
    assert not resolve_vision_config("ViT-S-32", str(tmp_path)).projection
    file.write_text(json.dumps(said | {"resample": 2}))
    assert resolve_vision_config("ViT-S-32", str(tmp_path)).interpolation == "bilinear"
    file.write_text(json.dumps(said | {key: value}))
    with pytest.raises(UserError, match=f"preprocessor_config.json: {key} is {value}; only "):
        resolve_vision_config("ViT-S-32", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "tag"), [("ViT-B-16-SigLIP", "webli"), ("EVA02-B-16", "merged2b_s8b_b131k")]
)
def test_a_folder_of_hugging_face_for_an_encoder_that_is_no_clip_of_it(name, tag, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip_vision_model"}))
    with pytest.raises(UserError) as caught:
        check_vision_weights(name, str(tmp_path))
    said = str(caught.value)
    assert f"vision.name={name} is no CLIP of that layout; allowed are 'random'" in said
    assert tag in said and "timm/NAME" in said
    assert "format=" not in said and "\n" not in said  # nothing is exported
