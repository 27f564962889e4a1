"""The embedded miniatures: the files are those recorded, and are as good as recorded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaForCausalLM

import vlbench.model.tiny
from vlbench.data.template import YI_VL
from vlbench.data.tokenizer import Tokenizer
from vlbench.model.tiny import make_language, make_tokenizer, make_tower
from vlbench.model.tiny.begin import begin

TINY = Path(vlbench.model.tiny.__file__).parent
MANIFEST = json.loads((TINY / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(TINY / "language")


@pytest.fixture(scope="module")
def language() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(TINY / "language", dtype=torch.float32).eval()


def test_files_are_those_recorded() -> None:
    found = {
        path.relative_to(TINY).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in ("language", "tower")
        for path in (TINY / folder).iterdir()
    }
    assert found == MANIFEST["files"]


def test_files_are_small_and_are_data() -> None:
    files = [path for folder in ("language", "tower") for path in (TINY / folder).iterdir()]
    assert sum(path.stat().st_size for path in files) <= 8e6
    assert {path.suffix for path in files} == {".safetensors", ".json", ".model"}
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                kinds = {tensors.get_tensor(name).dtype for name in tensors.keys()}  # noqa: SIM118
            assert kinds == {torch.float16}


def test_special_tokens_have_the_ids_of_yi(tokenizer: Tokenizer) -> None:
    names = ("<unk>", "<|startoftext|>", "<|endoftext|>")
    assert [tokenizer.encode(name) for name in names] == [[0], [1], [2]]
    assert tokenizer.encode("<|im_start|>") == [6]
    assert tokenizer.encode("<|im_end|>") == [7]
    assert len(tokenizer.encode("###")) == len(tokenizer.encode("\n")) == 1
    assert tokenizer.encode("12") == tokenizer.encode("1") + tokenizer.encode("2")


def test_the_system_prompt_is_short_and_text_survives(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode(YI_VL.system)) < 70
    for text in (YI_VL.system, "Where is it?", "星形在哪里？", "é 😀 龘", "x  y\n\n", "zebra 42"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_retrieval_among_96_captions(tokenizer: Tokenizer) -> None:
    tower = make_tower.build(TINY / "tower").eval()
    assert make_tower.retrieval(tower, tokenizer) >= 0.9


def test_patch_features_tell_colour_and_shape() -> None:
    tower = make_tower.build(TINY / "tower").eval()
    figures = make_tower.probe(tower, scenes=600)
    recorded = MANIFEST["quality"]["tower"]
    assert figures["probe_colour"] >= recorded["probe_colour"] - 0.05
    assert figures["probe_shape"] >= recorded["probe_shape"] - 0.1


def test_perplexity(tokenizer: Tokenizer, language: LlamaForCausalLM) -> None:
    measured = make_language.perplexity(language, tokenizer)
    assert measured <= 1.05 * MANIFEST["quality"]["language"]["perplexity"]


def test_answers_about_scenes_told_in_words(
    tokenizer: Tokenizer, language: LlamaForCausalLM
) -> None:
    figures = make_language.text_answers(language, tokenizer, count=100)
    recorded = MANIFEST["quality"]["language"]["text_answers"]
    for kind, share in figures["text_answers"].items():
        assert share >= recorded[kind] - 0.02, kind
    assert max(figures["blank_answers"].values()) <= 0.5


def test_language_model_has_the_architecture_of_yi(language: LlamaForCausalLM) -> None:
    config = language.config
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.rope_parameters["rope_theta"] == 5e6
    assert config.rms_norm_eps == 1e-5 and not config.tie_word_embeddings
    assert config.model_type == "llama"


def test_a_new_language_model_begins_with_heads_that_look_back() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(make_language.configuration())
    begin(model)
    model.set_attn_implementation("eager")
    ids = torch.randint(3, make_tokenizer.PIECES, (8, 24))
    seen = model(input_ids=ids, output_attentions=True).attentions[0].mean(0)  # [heads, to, from]
    for head, back in enumerate((1, 2, 3)):
        nearest = seen[head].argmax(-1)[4:]
        assert (torch.arange(4, 24) - nearest == back).float().mean() > 0.8
