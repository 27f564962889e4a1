"""What vLLM and SGLang read of an export for transformers: names, files, prompts, weights.

Neither is installed here. What they read is that of the released `llava-hf` folders.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_release import load_tensors, make_plain_llava
from PIL import Image
from test_hf_llava import export
from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration

import vlbench
from vlbench.data.sample import IMAGE_PLACEHOLDER

RELEASED_NAMES = (
    r"language_model\.lm_head\.weight",
    r"language_model\.model\.(embed_tokens|norm|layers\.\d+\.[\w.]+)\.weight",
    r"multi_modal_projector\.linear_[12]\.(weight|bias)",
    r"vision_tower\.vision_model\.embeddings\.(class_embedding|\w+_embedding\.weight)",
    r"vision_tower\.vision_model\.(pre_layrnorm|post_layernorm)\.(weight|bias)",
    r"vision_tower\.vision_model\.encoder\.layers\.\d+\.[\w.]+\.(weight|bias)",
)
"""Of https://huggingface.co/llava-hf/llava-1.5-7b-hf: every engine that serves LLaVA knows them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("engines")
    return export(make_plain_llava(home / "source"), home / "to")


def test_the_configuration_names_the_classes_of_model_and_parts(folder):
    said = json.loads((folder / "config.json").read_text())
    assert said["architectures"] == ["LlavaForConditionalGeneration"]
    assert said["text_config"]["architectures"] == ["LlamaForCausalLM"]
    assert said["vision_config"]["model_type"] == "clip_vision_model"
    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    assert config.model_type == "llava" and config.text_config.model_type == "llama"
    needed = ("image_token_index", "vision_feature_layer", "vision_feature_select_strategy")
    assert all(key in said for key in (*needed, "projector_hidden_act"))


def test_the_files_of_tokenizer_processor_and_template_are_there(folder):
    names = {file.name for file in folder.iterdir()}
    assert names >= {"tokenizer.json", "processor_config.json", "chat_template.jinja"}
    assert names >= {"tokenizer_config.json", "generation_config.json", "model.safetensors"}


def test_weights_have_the_released_names_and_all_are_read(folder):
    for name in load_tensors(folder):
        assert any(re.fullmatch(one, name) for one in RELEASED_NAMES), name
    _, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]


CONVERSATIONS = {
    "one image": [{"role": "user", "content": ["image", "What is it?"]}],
    "two": [{"role": "user", "content": ["image", "image", "Which is larger?"]}],
    "turns": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": ["image", "What is it?"]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Of which colour?"},
    ],
}


def with_images(messages: list[dict[str, Any]], image: object) -> list[dict[str, Any]]:
    """Return messages whose content is in parts, with an image where "image" stands."""
    return [
        {
            "role": one["role"],
            "content": one["content"]
            if isinstance(one["content"], str)
            else [
                {"type": "image", **({"image": image} if image else {})}
                if part == "image"
                else {"type": "text", "text": part}
                for part in one["content"]
            ],
        }
        for one in messages
    ]


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_the_template_writes_our_prompt_and_the_processor_makes_our_inputs(messages, folder):
    vlm = vlbench.load(folder, dtype="float32", device="cpu")
    processor: Any = AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    image = Image.effect_noise((90, 60), 80).convert("RGB")
    ours = vlm.prompt(with_images(messages, image))
    text = processor.apply_chat_template(with_images(messages, None), add_generation_prompt=True)
    assert text == ours.replace(IMAGE_PLACEHOLDER, processor.image_token)
    batch = vlm.prepare(with_images(messages, image))
    images = [image] * text.count(processor.image_token)
    theirs = processor(images=images, text=text, return_tensors="pt")
    ids = batch.input_ids.clone()
    ids[ids < 0] = processor.image_token_id
    assert torch.equal(theirs["input_ids"], ids)
    assert (theirs["pixel_values"] - batch.pixels).abs().max() <= 1e-5
