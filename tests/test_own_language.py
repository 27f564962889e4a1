"""A Qwen3 in small, with its own tokenizer and template: trained, asked, exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_release import CHECKPOINT, load_tensors
from language_folders import write_language_folder
from own_templates import OWN_TEMPLATES, write_tokenizer
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

import vlbench
from vlbench.__main__ import main
from vlbench.connector import registry
from vlbench.contract_checks.small_model import build_small_vlm
from vlbench.model.generation.growing_answer import eos_token_ids
from vlbench.model.language_model import load_language_model
from vlbench.model.weights.export_hf_llava import write_hf_llava

CONTENT = [{"type": "image", "image": Image.new("RGB", (60, 40), "red")}]
ASKED: list[dict[str, Any]] = [
    {"role": "user", "content": [*CONTENT, {"type": "text", "text": "它是什么？"}]},
]
LATER = [
    *ASKED,
    {"role": "assistant", "content": " A circle. "},
    {"role": "user", "content": "Sure?"},
]
QUICK = ["stages.chat.global_batch_size=2", "log.questions=2", "log.examples=0"]
QUICK += ["log.tensorboard=false", "only=chat", "data.workers=0", "connector.norm=false"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("own")
    write_language_folder("qwen3", folder / "qwen3", vocab_size=320, eos_token_id=256)
    (folder / "qwen3/tokenizer.model").unlink()
    write_tokenizer(folder / "qwen3", "qwen 3")
    words = ["recipe=yivl_llava", f"language.weights={folder / 'qwen3'}", "language.template=auto"]
    words += ["language.max_length=500", *QUICK]
    words += ["stages.chat.train={connector: {lr: 0.001}, language: {lr: 0.001}}"]
    assert main(["fit", *words, "stages.chat.steps=1", f"run={folder / 'run'}"]) == 0
    return folder / "run"


def test_a_run_is_asked_with_the_tokenizers_template_and_stops_at_its_end(run):
    vlm = vlbench.load(run, device="cpu")
    assert vlm.language.config.model_type == "qwen3" and vlm.processor.template.name == "auto"
    prompt = vlm.prompt(LATER)
    assert prompt == (
        "<|im_start|>user\n<image_placeholder>\n它是什么？<|im_end|>\n<|im_start|>assistant\n"
        "A circle.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    names = vlm.tokenizer.named_tokens
    ends = {names["<|endoftext|>"], names["<|im_end|>"]}
    assert eos_token_ids(vlm.model, vlm.processor) == ends
    said = iter([*vlm.tokenizer.encode("yes"), names["<|im_end|>"], *vlm.tokenizer.encode("no")])

    def say(hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor([next(said)]), 320).float()

    vlm.model.logits = say
    assert vlm.chat(ASKED, max_new_tokens=9) == "yes"


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_folder_for_transformers_has_our_logits_and_comes_back(family, tmp_path):
    """Tied embeddings and biases of queries too; what goes out is what comes in."""
    vlm = build_small_vlm(
        registry.load_connector("llava_mlp"),
        {"norm": False},
        CHECKPOINT,
        load_language_model(write_language_folder(family, tmp_path / family), torch.float32),
    ).eval()
    write_hf_llava(vlm, tmp_path / "to", None)
    assert "lm_head.weight" not in load_tensors(tmp_path / "to")  # tied: written once
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "to").eval()
    back = vlbench.load(tmp_path / "to", dtype="float32", device="cpu")
    assert type(back.language.config) is type(vlm.language.config)
    asked = [{"role": "user", "content": [*CONTENT, {"type": "text", "text": "What is it?"}]}]
    batch = vlm.prepare(asked)
    logits = vlm(batch).logits[0]
    write_hf_llava(vlm, half := tmp_path / "half", torch.bfloat16)
    assert "lm_head.weight" not in load_tensors(half)
    said = json.loads((half / "config.json").read_text())
    assert said["dtype"] == said["text_config"]["dtype"] == "bfloat16"
    assert back(back.prepare(asked)).logits[0, :, : logits.shape[1]].equal(logits)
    image_id = theirs.config.image_token_index
    ids = batch.input_ids.masked_fill(batch.input_ids < 0, image_id)
    found = theirs(input_ids=ids, pixel_values=batch.normalized_pixels()).logits[0]
    scale = max(1.0, float(logits.abs().max()))
    assert (found[:, : logits.shape[1]] - logits).abs().max() <= 1e-5 * scale


@torch.no_grad()
def test_an_export_for_transformers_answers_the_same(run, tmp_path):
    to, twice = tmp_path / "to", tmp_path / "twice"
    assert main(["export", f"model={run}", f"out={to}", "format=hf_llava"]) == 0
    ours = vlbench.load(run, dtype="float32", device="cpu")
    theirs = LlavaForConditionalGeneration.from_pretrained(to, dtype=torch.float32).eval()
    assert set(theirs.generation_config.eos_token_id) == eos_token_ids(ours.model, ours.processor)
    processor = AutoProcessor.from_pretrained(to, backend="pil", trust_remote_code=False)
    for asked in (ASKED, LATER):
        text = processor.apply_chat_template(asked)
        assert text == ours.prompt(asked).replace("<image_placeholder>", "<image>")
        inputs = processor(images=CONTENT[0]["image"], text=text, return_tensors="pt")
        batch = ours.prepare(asked)
        logits = ours(batch).logits[0, -1]
        assert torch.allclose(theirs(**inputs).logits[0, -1, : len(logits)], logits, atol=1e-4)
    back = vlbench.load(to, dtype="float32", device="cpu")
    assert back.processor.template.name == "auto" and back.prompt(LATER) == ours.prompt(LATER)
    assert main(["export", f"model={to}", f"out={twice}", "format=hf_llava"]) == 0
    names = ("chat_template.jinja", "tokenizer.json", "config.json", "model.safetensors")
    assert all((to / name).read_bytes() == (twice / name).read_bytes() for name in names)


def test_what_a_layout_cannot_hold_is_said(run, tmp_path, capsys):
    words = [f"model={run}", f"out={tmp_path / 'to'}", "format=yi_vl"]
    assert main(["export", *words]) == 2
    assert "language.template is auto" in capsys.readouterr().err
    assert main(["export", *words, "template=yi_vl"]) == 2
    assert "of the family Qwen3" in capsys.readouterr().err


def test_a_checkpoint_of_its_own_comes_back(run, tmp_path):
    to = tmp_path / "to"
    assert main(["export", f"model={run}", f"out={to}", "format=vlbench"]) == 0
    one, other = (vlbench.load(f, dtype="float32", device="cpu") for f in (run, to))
    assert other.processor.template == one.processor.template
    assert torch.equal(other(other.prepare(LATER)).logits, one(one.prepare(LATER)).logits)
    assert OWN_TEMPLATES["qwen 3"] == other.tokenizer.chat_template
