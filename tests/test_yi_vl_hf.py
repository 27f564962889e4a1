"""LLaMA-Factory's Yi-VL: a folder of transformers' LLaVA whose projector has LayerNorms."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from golden_release import CHECKPOINT, edit_json, load_tensors, make_plain_llava
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.models.llava import modeling_llava

import vlbench
from vlbench.__main__ import main

NOISE = torch.randint(0, 255, (50, 70, 3), generator=torch.Generator().manual_seed(3))
PICTURE = Image.fromarray(NOISE.byte().numpy())
QUESTION = [
    {
        "role": "user",
        "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "What? 什么？"}],
    }
]


class NormedProjector(nn.Module):
    """What a program that knows Yi-VL puts in the place of transformers' projector."""

    def __init__(self, config) -> None:
        super().__init__()
        inner, outer = config.vision_config.hidden_size, config.text_config.hidden_size
        self.linear_1, self.linear_2 = nn.Linear(inner, outer), nn.LayerNorm(outer)
        self.linear_3, self.linear_4 = nn.Linear(outer, outer), nn.LayerNorm(outer)

    def forward(self, features):
        hidden = nn.functional.gelu(self.linear_2(self.linear_1(features)))
        return self.linear_4(self.linear_3(hidden))


def export(source: Path, to: Path, layout: str = "yi_vl_hf") -> Path:
    assert main(["export", f"model={source}", f"out={to}", f"format={layout}"]) == 0
    return to


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return export(CHECKPOINT, tmp_path_factory.mktemp("yi") / "hf")


def test_the_folder_is_what_llama_factory_looks_for(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llava" and config["is_yi_vl_derived_model"] is True
    projector = {
        name.partition("multi_modal_projector.")[2]: tensor.dim()
        for name, tensor in load_tensors(folder).items()
        if "multi_modal_projector" in name
    }
    assert projector == {
        f"linear_{number}.{kind}": 2 if (number, kind) in ((1, "weight"), (3, "weight")) else 1
        for number in (1, 2, 3, 4)
        for kind in ("weight", "bias")
    }
    assert "--template yi_vl" in (folder / "README.md").read_text()


@torch.no_grad()
def test_with_that_projector_transformers_computes_the_same_logits(folder, monkeypatch):
    monkeypatch.setattr(modeling_llava, "LlavaMultiModalProjector", NormedProjector)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    vlm = vlbench.load(CHECKPOINT, dtype="float32", device="cpu")
    prompt = processor.apply_chat_template(QUESTION)
    inputs = processor(images=PICTURE, text=prompt, return_tensors="pt")
    ours = vlm(vlm.prepare(QUESTION)).logits[0]
    theirs = model(**inputs).logits[0, :, : ours.shape[-1]]
    assert (ours - theirs).abs().max() <= 1e-3
    back = vlbench.load(folder, dtype="float32", device="cpu")
    assert torch.equal(back(back.prepare(QUESTION)).logits[0][:, : ours.shape[-1]], ours)


def test_there_and_back_every_tensor_is_the_same(folder, tmp_path):
    first, second = load_tensors(folder), load_tensors(export(folder, tmp_path / "hf"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    released, back = load_tensors(CHECKPOINT), load_tensors(export(folder, tmp_path / "y", "yi_vl"))
    projector = [name for name in released if "mm_projector" in name]
    assert len(projector) == 8
    assert all(torch.equal(released[name], back[name]) for name in projector)


def test_a_folder_with_the_language_models_template_and_old_names_is_yi_vl(
    folder, tmp_path, capsys
):
    """Other versions of transformers write other prefixes; a tokenizer may have its ChatML."""
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    state = load_file(old / "model.safetensors")
    prefixes = {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "vision_tower.": "model.vision_tower.",
    }
    renamed = {
        new + name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        for prefix, new in prefixes.items()
        if name.startswith(prefix)
    }
    assert renamed.keys().isdisjoint(state) and len(renamed) == len(state)
    save_file(renamed, old / "model.safetensors")
    for file in ("chat_template.jinja", "chat_template.json"):
        (old / file).unlink(missing_ok=True)
    edit_json(old / "tokenizer_config.json", chat_template="{{ '<|im_start|>' }}")
    vlm = vlbench.load(old)
    assert vlm.processor.template.name == "yi_vl"
    assert "LayerNorms" in capsys.readouterr().err
    ours = vlbench.load(folder).connector.state_dict()
    assert all(torch.equal(ours[name], one) for name, one in vlm.connector.state_dict().items())


def test_its_projector_alone_is_read_into_a_connector(folder, tmp_path):
    from vlbench.model.weights.llava_projector import read_mm_projector

    state = read_mm_projector(load_tensors(folder))
    assert sorted(state) == [f"{n}.{kind}" for n in (0, 1, 3, 4) for kind in ("bias", "weight")]
    assert state["1.weight"].dim() == 1 and state["3.weight"].dim() == 2


def test_what_it_cannot_hold_is_one_line(tmp_path, capsys):
    plain = make_plain_llava(tmp_path / "plain")
    words = ["export", f"model={plain}", f"out={tmp_path / 'to'}", "format=yi_vl_hf"]
    assert main(words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "holds two Linear layers with LayerNorms; format=hf_llava" in said
    assert main(["export", f"model={CHECKPOINT}", f"out={tmp_path / 'to'}", "format=hf_llava"]) == 2
    assert "format=yi_vl or format=yi_vl_hf holds this one" in capsys.readouterr().err
    assert not (tmp_path / "to").exists()


def test_another_activation_is_refused(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "other")
    edit_json(tmp_path / "other/config.json", projector_hidden_act="linear")
    assert main(["chat", f"model={tmp_path / 'other'}", "question=What?"]) == 2
    assert "is_yi_vl_derived_model is true and projector_hidden_act is 'linear'" in (
        capsys.readouterr().err
    )
