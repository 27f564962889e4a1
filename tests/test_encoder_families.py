"""Vision encoders of timm and open_clip on a hub: every family gives its library's own features.

The repositories are of `hub.small_encoders`: the real layouts and architectures, made small.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hub.client import visit_hub
from hub.server import FakeHub, serve_hub
from hub.small_encoders import FAMILIES, HYBRIDS, small_encoder_repositories
from hub.weight_comparison import load_tensors
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vlbench
from vlbench.__main__ import main
from vlbench.connector import registry
from vlbench.encoder_names import check_encoder_name
from vlbench.errors import UserError
from vlbench.model.vision_encoder import build_vision_encoder, check_vision_weights
from vlbench.train import checkpoint_files

OPEN_CLIP = "owner/small-clip"
HEADS = ("head.", "head_dist.")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    with serve_hub(small_encoder_repositories(tmp_path_factory.mktemp("hub"))) as hub:
        yield hub


@pytest.fixture
def hub(served: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """The hub, from which nothing has been fetched yet."""
    return visit_hub(monkeypatch, served, tmp_path)


def timm_features(model: nn.Module, pixels: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return what a block of timm's model gives in its own forward: the prefix, and the patches."""
    outputs: list[Tensor] = []
    hook = model.blocks[block].register_forward_hook(lambda *call: outputs.append(call[2]))
    with torch.no_grad():
        model.forward_features(pixels)
    hook.remove()
    return outputs[0].split(
        [model.num_prefix_tokens, outputs[0].shape[1] - model.num_prefix_tokens], dim=1
    )


def test_a_repository_is_asked_for_each_file_once(hub):
    build_vision_encoder(next(iter(FAMILIES)), next(iter(FAMILIES)))
    asked = [one.path.rpartition("/")[2] for one in hub.log if one.method == "HEAD"]
    assert asked == ["open_clip_config.json", "config.json", "model.safetensors"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_of_timm_is_loaded_whole_and_gives_timms_features(name, hub):
    folder = hub[name].folder
    encoder = build_vision_encoder(name, name).eval()
    assert hub.fetched() == {name: {"config.json", "model.safetensors"}}
    reference = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    own = {key.removeprefix("trunk."): value for key, value in encoder.visual.state_dict().items()}
    wanted = {k: v for k, v in reference.state_dict().items() if not k.startswith(HEADS)}
    assert own.keys() == wanted.keys()
    assert all(own[key].equal(wanted[key]) for key in wanted)
    stored = load_tensors([folder / "model.safetensors"])
    changed = {key for key in own if not (key in stored and own[key].equal(stored[key]))}
    assert changed == ({"pos_embed"} if "radio" in name else set())
    size = FAMILIES[name]
    assert encoder.image_size == size
    for side in (size, size * 3 // 2):
        encoder.set_image_size(side)
        if side != size and hasattr(reference, "set_input_size"):
            reference.set_input_size((side, side))
        pixels = torch.randn(2, 3, side, side)
        for layer in (-2, 0):
            encoder.block_index = layer % 3
            encoder.read_blocks((), False)
            prefix, patches = timm_features(reference, pixels, layer)
            with torch.no_grad():
                assert (encoder(pixels) - patches).abs().max() <= 1e-6
                if encoder.has_class_token:
                    encoder.read_blocks((), True)
                    first = encoder(pixels)[:, 0]
                    assert (first - prefix[:, 0]).abs().max() <= 1e-6
    has_token = getattr(reference, "cls_token", None) is not None
    assert encoder.has_class_token == has_token


SHORT = ["fit", "recipe=yivl_llava", "only=chat", "stages.chat.steps=1", "log.questions=1"]
SHORT += ["stages.chat.global_batch_size=2", "log.examples=0", "log.tensorboard=false"]
SHORT += ["data.samples=20"]


QUICK = ("timm/vit_base_patch16_dinov3.lvd1689m", "timm/aimv2_large_patch14_224.apple_pt")


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES],
)
def test_a_family_of_timm_is_trained_saved_and_loaded_again(name, hub, capsys):
    words = [f"vision.name={name}", f"stages.chat.image_size={FAMILIES[name]}"]
    has_token = build_vision_encoder(name, "random").has_class_token
    connector = [] if has_token else ["connector.name=qformer"]
    assert main([*SHORT, *words, *connector, "run=run"]) == 0
    told = capsys.readouterr().out
    assert f"vision {name} -> connector" in told
    checkpoint = checkpoint_files.find_checkpoint(Path("run"))
    saved = load_file(checkpoint / "model.safetensors")
    before = load_tensors([hub[name].folder / "model.safetensors"])
    key = "blocks.0.mlp.fc1.weight"
    key = key if key in before else "blocks.0.mlp.fc1_g.weight"
    assert not saved[f"vision.visual.trunk.{key}"].equal(before[key])
    hub.forget()
    vlm = vlbench.load("run")
    own = vlm.vision.state_dict()
    assert {f"vision.{key}" for key in own} == {key for key in saved if key.startswith("vision.")}
    assert all(own[key].equal(saved[f"vision.{key}"]) for key in own)
    assert not hub.log  # its architecture is in the checkpoint


@pytest.mark.parametrize("name", HYBRIDS)
def test_what_is_no_plain_vit_is_refused_in_one_line_that_says_why(name, hub, capsys):
    assert main([*SHORT, f"vision.name={name}"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and HYBRIDS[name] in lines[0] and "plain ViT" in lines[0]
    assert hub.fetched() == {name: {"config.json"}}


@pytest.mark.parametrize("name", ["MobileCLIP-S1", "MobileCLIP-B", "convnext_base", "RN50"])
def test_hybrids_of_open_clip_are_refused_by_name(name, capsys):
    assert main([*SHORT, f"vision.name={name}", "vision.weights=random"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "plain ViT" in lines[0] and name in lines[0]


def test_a_repository_of_open_clip_is_read_by_its_own_file(hub):
    encoder = build_vision_encoder(OPEN_CLIP, OPEN_CLIP)
    assert hub.fetched() == {OPEN_CLIP: {"open_clip_config.json", "open_clip_model.safetensors"}}
    stored = load_tensors([hub[OPEN_CLIP].folder / "open_clip_model.safetensors"])
    own = encoder.visual.state_dict()
    assert all(stored[f"visual.{key}"].equal(own[key]) for key in own)
    assert (encoder.fit, encoder.interpolation) == ("squash", "bilinear")


def test_pixels_are_those_of_the_librarys_own_transform(hub):
    """Squashed, and cropped from a larger picture: mean, std and interpolation are the file's."""
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from timm.data import create_transform

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 150, 3), np.uint8))
    squash = image_transform_v2(
        PreprocessCfg(
            56, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", resize_mode="squash"
        ),
        is_train=False,
    )
    own = build_vision_encoder(OPEN_CLIP, "random").transform
    assert (own(image) - squash(image)).abs().max() < 1e-6
    name = "timm/vit_base_patch14_dinov2.lvd142m"
    own = build_vision_encoder(name, "random").transform
    said = json.loads((hub[name].folder / "config.json").read_text())["pretrained_cfg"]
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    theirs = create_transform(**{key: said[key] for key in keys if key in said})
    assert (own(image) - theirs(image)).abs().max() < 1e-6
    assert own.describe().startswith("cropped to 56 x 56, bicubic, mean 0.485 0.456 0.406")


def test_a_tensor_that_is_missing_surplus_or_of_another_shape_is_named(hub, tmp_path):
    name = "timm/vit_base_patch14_reg4_dinov2.lvd142m"
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "config.json").write_text((hub[name].folder / "config.json").read_text())
    whole = load_file(hub[name].folder / "model.safetensors")
    without = {key: value for key, value in whole.items() if key != "reg_token"}
    cases = {
        "reg_token": without,
        "extra.weight": {**whole, "extra.weight": torch.zeros(1)},
        "norm.weight": {**whole, "norm.weight": torch.zeros(7)},
    }
    for wrong, state in cases.items():
        save_file(state, folder / "model.safetensors")
        for load in (build_vision_encoder, check_vision_weights):
            with pytest.raises(UserError, match=wrong):
                load(str(folder), "embedded")
    save_file(whole, folder / "model.safetensors")
    build_vision_encoder(str(folder), "embedded")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("vit_base_patch16_dinov3.lvd1689m", "timm/vit_base_patch16_dinov3.lvd1689m"),
        ("hf-hub:timm/eva02_base_patch14_448.mim", "timm/eva02_base_patch14_448.mim"),
        ("ViT-L-141", "ViT-L-14"),
    ],
)
def test_a_name_as_timm_takes_it_has_its_repository(given, meant):
    with pytest.raises(ValueError, match=f"Did you mean '{re.escape(meant)}'"):
        check_encoder_name(given)


def test_an_encoder_of_other_channels_is_refused(hub, tmp_path):
    said = json.loads((hub[QUICK[0]].folder / "config.json").read_text())
    said["model_args"]["in_chans"] = 4
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match="in_chans is 4; images here have 3 channels"):
        build_vision_encoder(str(tmp_path), "random")


def test_a_mistyped_repository_of_timm_has_its_nearest(hub):
    with pytest.raises(UserError, match="Did you mean 'vit_base_patch16_dinov3.lvd1689m'") as found:
        build_vision_encoder("timm/vit_base_patch16_dinov3.lvd1698m", "random")
    assert "\n" not in str(found.value)


def test_an_encoder_without_a_final_norm_refuses_to_apply_it(hub):
    name = "timm/vit_base_patch16_radio_v3.c_radio"
    with pytest.raises(UserError, match=r"vision\.norm is true"):
        build_vision_encoder(name, "random", norm=True)


@pytest.mark.parametrize("connector", list(registry.connector_locations()))
def test_every_connector_works_without_a_class_token(connector, hub):
    from random_vlm import SMALL, make_batch, make_sample, small_vlm

    from vlbench.model.loaded_vlm import assemble_vlm

    other = small_vlm(registry.load_connector(connector), SMALL.get(connector))
    encoder = build_vision_encoder("timm/aimv2_large_patch14_224.apple_pt", "random")
    vlm = assemble_vlm(
        encoder,
        type(other.connector),
        other.model.connector_options,
        other.language,
        other.tokenizer,
        other.processor.template,
        512,
    )
    assert not encoder.class_token and not vlm.connector.class_token
    for hook in other.model._inject_hooks:
        hook.remove()
    assert vlm(make_batch(vlm, [[make_sample(1, images=2)]])).loss_sum.isfinite()


def test_a_connector_that_needs_a_class_token_is_refused_in_one_line(hub, tmp_path, capsys):
    (tmp_path / "connectors").mkdir()
    (tmp_path / "connectors/reader.py").write_text(
        "from torch import nn\nfrom vlbench.connector.base import Connector\n\n\n"
        "class Reader(Connector):\n    class_token = True\n\n"
        "    def __init__(self, shapes):\n        super().__init__()\n"
        "        self.layer = nn.Linear(shapes.vision_width, shapes.lm_width)\n\n"
        "    def forward(self, features):\n        return self.layer(features[:, :1])\n"
    )
    words = ["vision.name=timm/aimv2_large_patch14_224.apple_pt", "stages.chat.image_size=56"]
    assert main([*SHORT, *words, "connector.name=reader"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "reads the class token, and this vision encoder has none" in lines[0]


def test_a_run_of_before_goes_on_with_its_own_pixels(hub, tmp_path, capsys):
    """Versions before padded every image, and checkpoints keep what was done to images."""
    words = [f"vision.name={OPEN_CLIP}", "stages.chat.image_size=56", "run=run"]
    words += ["stages.chat.train.vision=null"]
    assert main([*SHORT, *words]) == 0
    assert "an image is squashed to 56 x 56, bilinear" in capsys.readouterr().out
    checkpoint = checkpoint_files.find_checkpoint(Path("run"))
    file = checkpoint / "vision/open_clip_config.json"
    said = json.loads(file.read_text())
    said["preprocess_cfg"] = {key: said["preprocess_cfg"][key] for key in ("mean", "std")}
    file.write_text(json.dumps(said))
    with pytest.raises(UserError, match="other image preprocessing"):
        vlbench.load("run")  # the hash in this checkpoint is that of squashed images
    Path("run/results.json").unlink()
    assert main([*SHORT, *words]) == 0
    assert "an image is padded to 56 x 56, bicubic" in capsys.readouterr().out
