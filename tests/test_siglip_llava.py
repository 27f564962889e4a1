"""A SigLIP in transformers' LLaVA: the same features and logits there, and the same model back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_release import edit_json, load_tensors, make_plain_llava
from PIL import Image
from test_hf_llava import export, same_files
from test_other_engines import RELEASED_NAMES
from transformers import AutoImageProcessor, AutoProcessor, LlavaForConditionalGeneration

import vlbench
from vlbench.__main__ import main
from vlbench.compat.vision_internals import build_timm_encoder
from vlbench.connector import registry
from vlbench.errors import UserError
from vlbench.model.loaded_vlm import LoadedVLM, assemble_vlm
from vlbench.model.vision_encoder import VisionEncoder
from vlbench.model.weights import siglip_layouts, vision_layouts
from vlbench.model.weights.export_hf_llava import write_hf_llava

SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 2.5}
PIXELS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "fit": "squash"}


def siglip_vlm(source: Path, layer: int = -2, size: int = 64, **changes: Any) -> LoadedVLM:
    """Return a model with a small random SigLIP, in float32."""
    torch.manual_seed(0)
    arguments = {**SMALL, "act_layer": "gelu_tanh", **changes}
    visual = build_timm_encoder("vit_base_patch16_siglip_224", arguments, size)
    for parameter in visual.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    other = vlbench.load(source, dtype="float32", device="cpu", template="yi_vl")
    vlm = assemble_vlm(
        VisionEncoder(visual, layer, False, {**PIXELS, "resize": size, "crop": size}),
        registry.load_connector("llava_mlp"),
        {"depth": 2, "norm": False},
        other.language,
        other.tokenizer,
        other.processor.template,
        4096,
    )
    return vlm.eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_plain_llava(tmp_path_factory.mktemp("siglip") / "source")


@pytest.mark.parametrize(("layer", "activation"), [(-2, "gelu_tanh"), (-1, "gelu")])
@torch.no_grad()
def test_transformers_computes_the_same_and_it_comes_back(layer, activation, source, tmp_path):
    vlm = siglip_vlm(source, layer, act_layer=activation)
    folder = tmp_path / "to"
    folder.mkdir()
    write_hf_llava(vlm, folder, None)
    picture = Image.effect_noise((90, 60), 80).convert("RGB")
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": parts}]
    batch = vlm.prepare(messages)
    assert batch.pixels.shape == (1, 3, 64, 64)
    ours = vlm(batch).logits[0]

    theirs: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor: Any = AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    text = processor.apply_chat_template(messages)
    inputs = processor(images=[picture], text=text, return_tensors="pt")
    assert (inputs["pixel_values"] - batch.pixels).abs().max() <= 1e-5
    assert inputs["input_ids"].shape == batch.input_ids.shape
    hidden = theirs.model.vision_tower(batch.pixels, output_hidden_states=True).hidden_states
    assert (hidden[layer] - vlm.features(batch)).abs().max() <= 1e-5 * hidden[layer].abs().max()
    logits = theirs(**inputs).logits[0, :, : ours.shape[-1]]
    assert (logits - ours).abs().max() <= 1e-5 * ours.abs().max()
    assert not ours[:-1].equal(vlm(vlm.prepare([{"role": "user", "content": "x"}])).logits[0, :-1])

    back = vlbench.load(folder, dtype="float32", device="cpu", template="yi_vl")
    again = back(back.prepare(messages)).logits[0, :, : ours.shape[-1]]  # a row more: the image's
    assert torch.equal(again, ours)
    assert back.processor.transform == vlm.processor.transform
    same_files(export(folder, tmp_path / "once"), export(folder, tmp_path / "twice"))


@torch.no_grad()
def test_an_image_size_that_is_not_whole_patches_is_kept(source, tmp_path):
    """As of so400m-patch14-384: 27 patches of 14 pixels, and 6 pixels that no patch sees."""
    torch.manual_seed(0)
    vlm = siglip_vlm(source, size=44, patch_size=14)
    (tmp_path / "to").mkdir()
    write_hf_llava(vlm, tmp_path / "to", None)
    words = ["format=vlbench", f"model={tmp_path / 'to'}", f"out={tmp_path / 'own'}"]
    assert main(["export", *words]) == 0
    own = vlbench.load(tmp_path / "own", dtype="float32", device="cpu")
    picture = Image.effect_noise((90, 60), 80).convert("RGB")
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": parts}]
    batch = own.prepare(messages)
    assert batch.pixels.shape[-1] == own.vision.image_size == 44 and own.vision.grid == (3, 3)
    ours = vlm(vlm.prepare(messages)).logits
    assert torch.equal(own(batch).logits[..., : ours.shape[-1]], ours)
    own.set_image_size(44)
    with pytest.raises(UserError, match="a multiple of 14"):
        own.set_image_size(45)


@torch.no_grad()
def test_a_folder_with_siglips_own_processor_and_its_pooling_head_is_read(source, tmp_path):
    """As published folders are: the processor does not crop, and nothing reads the head."""
    folder = tmp_path / "own"
    folder.mkdir()
    write_hf_llava(siglip_vlm(source), folder, None)
    before = vlbench.load(folder, dtype="float32", device="cpu", template="yi_vl")
    (folder / "processor_config.json").unlink()
    pixels = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": None}
    pixels |= {"rescale_factor": 1 / 255, "resample": 3, "size": {"height": 64, "width": 64}}
    pixels |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    said = {"image_processor_type": "SiglipImageProcessor", **pixels}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"].pop("vision_use_head")
    (folder / "config.json").write_text(json.dumps(config))
    theirs: Any = LlavaForConditionalGeneration.from_pretrained(folder)  # with a new, random head
    theirs.save_pretrained(folder)
    assert any(".head." in name for name in load_tensors(folder))
    after = vlbench.load(folder, dtype="float32", device="cpu", template="yi_vl")
    assert after.processor.transform == before.processor.transform
    picture = Image.effect_noise((90, 60), 80).convert("RGB")
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": parts}]
    batch = after.prepare(messages)
    processor: Any = AutoImageProcessor.from_pretrained(
        folder, backend="pil", trust_remote_code=False
    )
    shown = processor(images=[picture], return_tensors="pt")["pixel_values"]
    assert (shown - batch.pixels).abs().max() <= 1e-5
    assert torch.equal(after(batch).logits, before(before.prepare(messages)).logits)


def test_siglips_processor_without_height_and_width_is_refused(source, tmp_path):
    write_hf_llava(siglip_vlm(source), tmp_path, None)
    said = {"image_processor_type": "SiglipImageProcessor", "size": {"shortest_edge": 64}}
    edit_json(tmp_path / "processor_config.json", image_processor=said)
    with pytest.raises(UserError, match="size is {'shortest_edge': 64}; of SigLIP's"):
        vlbench.load(tmp_path, template="yi_vl")


def test_the_pooling_head_is_left_out_and_names_are_the_released_ones(source, tmp_path):
    vlm = siglip_vlm(source)
    assert hasattr(vlm.vision.visual.trunk, "attn_pool")
    write_hf_llava(vlm, tmp_path, None)
    names = load_tensors(tmp_path)
    assert not [name for name in names if ".head." in name or "attn_pool" in name]
    patterns = "|".join(RELEASED_NAMES)
    embedding = r"|vision_tower\.vision_model\.embeddings\.patch_embedding\.bias"
    assert all(re.fullmatch(patterns + embedding, name) for name in names)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["vision_config"]["model_type"] == "siglip_vision_model"
    assert said["vision_feature_select_strategy"] == "full"
    assert said["vision_config"]["vision_use_head"] is False


@pytest.mark.parametrize(
    "changes", [{"qk_norm": True}, {"init_values": 0.1}, {"reg_tokens": 2}, {"act_layer": "silu"}]
)
def test_another_vit_is_refused(changes):
    visual = build_timm_encoder("vit_base_patch16_siglip_224", {**SMALL, **changes}, 64)
    with pytest.raises(UserError, match="plain ViTs of CLIP and SigLIP alone"):
        vision_layouts.to_hf_vision_config(visual)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("layer_norm_eps", 1e-5, "layer_norm_eps is 1e-05"),
        ("hidden_act", "relu", "hidden_act is 'relu'"),
        ("hidden_size", 0, "hidden_size"),
    ],
)
def test_a_configuration_that_is_not_done_here_is_refused(key, value, said):
    with pytest.raises(UserError, match=said):
        siglip_layouts.parse_vision_config({key: value}, Path("config.json"))


def test_one_length_of_an_older_file_is_the_shortest_edge(source, tmp_path):
    """transformers reads it so: the image keeps its shape, and its centre is cropped."""
    write_hf_llava(siglip_vlm(source), tmp_path, None)
    file = tmp_path / "processor_config.json"
    file = file if file.is_file() else tmp_path / "preprocessor_config.json"
    said = json.loads(file.read_text())
    (said.get("image_processor") or said)["size"] = 64
    file.write_text(json.dumps(said))
    transform = vlbench.load(tmp_path, template="yi_vl").processor.transform
    assert (transform.size, transform.crop, transform.squash) == (64, 64, False)


def test_another_kind_of_encoder_in_a_folder_is_named(source, tmp_path):
    folder = export(source, tmp_path / "to")
    edit_json(folder / "config.json", vision_config={"model_type": "pixtral"})
    with pytest.raises(UserError, match="model_type 'pixtral'; known are clip_vision_model and"):
        vlbench.load(folder)


@pytest.mark.slow
def test_a_run_may_begin_with_one_and_ends_as_one(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "begun").mkdir()
    write_hf_llava(siglip_vlm(source), tmp_path / "begun", None)
    words = ["recipe=yivl_llava", "init=begun", "only=chat", "connector.norm=false", "run=run"]
    words += ["stages.chat.steps=1", "stages.chat.image_size=96", "stages.chat.global_batch_size=2"]
    words += ["log.questions=2", "log.tensorboard=false", "log.examples=0"]
    assert main(["fit", *words, "language.template=yi_vl"]) == 0
    run = vlbench.load("run", dtype="float32", device="cpu")
    back = vlbench.load(export(Path("run"), Path("to")), dtype="float32", device="cpu")
    assert run.processor.transform.squash and back.processor.transform == run.processor.transform
    messages = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
    messages[0]["content"].insert(0, {"type": "image", "image": Image.new("RGB", (50, 90), "red")})
    ours = run(run.prepare(messages)).logits[0]
    assert torch.equal(back(back.prepare(messages)).logits[0, :, : ours.shape[-1]], ours)
