"""The parts by themselves: their real sizes, and weights in the layouts of others."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from golden_release import CHECKPOINT, edit_json
from hub.client import go_offline
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import vlbench
from vlbench.__main__ import main
from vlbench.config import recipe as recipes
from vlbench.data.tokenizer import FastTokenizer, Tokenizer
from vlbench.errors import UserError
from vlbench.model.build_vlm import build_vlm
from vlbench.model.language_model import (
    build_language_model,
    build_random_language,
    load_language_model,
    named_language_config,
)
from vlbench.model.packed_attention import PACKED_ATTENTION
from vlbench.model.vision_encoder import build_vision_encoder
from vlbench.model.weights import clip_layouts

TEXTS = json.loads((CHECKPOINT.parents[1] / "tokenizer_cases.json").read_text(encoding="utf-8"))


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("size", "language", "projector"),
    [("6b", 6_061_035_520, 22_044_672), ("34b", 34_388_917_248, 60_598_272)],
)
def test_real_sizes_have_the_published_numbers_of_parameters(size, language, projector):
    words = ["recipe=yivl_llava", f"size={size}"]
    recipe = recipes.load_recipe([*words, "vision.weights=random", "language.weights=random"])
    with torch.device("meta"):  # no memory is taken
        vlm = build_vlm(recipe.model, 224)
        encoder = count(vlm.vision)
        vlm.set_image_size(448)
    assert count(vlm.language) == language and count(vlm.connector) == projector
    assert encoder == 632_076_800  # open_clip's visual, with its projection
    as_published = clip_layouts.to_hf_state_dict(vlm.vision.visual)
    assert sum(tensor.numel() for tensor in as_published.values()) == 631_749_120
    assert vlm.connector.tokens_per_image == 1024


def llama(folder: Path, tied: bool = False, **options) -> LlamaForCausalLM:
    """Save a small language model with Yi's tokenizer in the Hugging Face layout."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1600,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        eos_token_id=[2, 7],
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder, **options)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).write_bytes((CHECKPOINT / name).read_bytes())
    return model


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["whole", "shards"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@torch.no_grad()
def test_any_llama_folder_is_a_language_model(tied, options, tmp_path):
    theirs = llama(tmp_path, tied, **options)
    ours = build_language_model("yi-6b", str(tmp_path)).eval()
    assert ours.config._attn_implementation == PACKED_ATTENTION
    ids = torch.arange(20)[None]
    assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-5)
    assert ours.generation_config.eos_token_id == [2, 7]
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied


def test_a_tied_language_model_trains_and_is_exported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    llama(tmp_path / "llama", tied=True)
    words = [f"language.weights={tmp_path / 'llama'}", "only=chat", "stages.chat.steps=2"]
    words += [
        "stages.chat.global_batch_size=4",
        "log.questions=4",
        "log.tensorboard=false",
        "run=run",
    ]
    assert main(["fit", "recipe=yivl_llava", *words]) == 0
    ask = [{"role": "user", "content": "Hello"}]
    ours = vlbench.load("run")
    assert ours.language.lm_head.weight is ours.language.model.embed_tokens.weight
    for layout in ("yi_vl", "vlbench"):
        assert main(["export", "model=run", f"out={layout}", f"format={layout}"]) == 0
        back = vlbench.load(layout)
        assert back.language.lm_head.weight is back.language.model.embed_tokens.weight
        assert torch.equal(back(back.prepare(ask)).logits, ours(ours.prepare(ask)).logits)


def test_another_architecture_is_refused(tmp_path):
    llama(tmp_path)
    edit_json(tmp_path / "config.json", model_type="gemma2")
    with pytest.raises(UserError, match="model_type is 'gemma2'.*Yi-1.5"):
        build_language_model("yi-6b", str(tmp_path))


SMALLEST = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}


@torch.no_grad()
def test_an_encoder_takes_the_weights_of_a_clip_folder_at_its_image_size(tmp_path):
    config = CLIPVisionConfig(
        **SMALLEST, num_hidden_layers=12, patch_size=32, image_size=96, hidden_act="gelu"
    )
    torch.manual_seed(1)
    theirs = CLIPVisionModel(config).eval()
    theirs.save_pretrained(tmp_path)
    encoder = build_vision_encoder("ViT-S-32", str(tmp_path)).eval()
    pixels = torch.randn(2, 3, 96, 96)
    expected = theirs(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert encoder.image_size == 96 and torch.allclose(encoder(pixels), expected, atol=1e-4)
    edit_json(tmp_path / "config.json", hidden_act="quick_gelu")
    with pytest.raises(UserError, match="hidden_act is quick_gelu.*gelu"):
        build_vision_encoder("ViT-S-32", str(tmp_path))


def test_the_miniature_takes_no_other_weights():
    with pytest.raises(
        UserError, match="vision.weights is 'laion2b'; vision.name=tiny has its own"
    ):
        build_vision_encoder("tiny", "laion2b")


def test_a_tag_that_cannot_be_fetched_is_one_line(monkeypatch):
    go_offline(monkeypatch)
    with pytest.raises(
        UserError, match="vision.weights.*open_clip_model.safetensors.*looked for in"
    ):
        build_vision_encoder("ViT-B-32", "laion2b_s34b_b79k")


def test_a_folder_with_tokenizer_json_alone_has_a_tokenizer(tmp_path):
    PreTrainedTokenizerFast.from_pretrained(CHECKPOINT).save_pretrained(tmp_path)
    slow, fast = Tokenizer.load(CHECKPOINT), Tokenizer.load(tmp_path)
    assert isinstance(fast, FastTokenizer) and not (tmp_path / "tokenizer.model").exists()
    assert (fast.vocab_size, fast.eos_token_id, fast.eos_token) == (
        slow.vocab_size,
        slow.eos_token_id,
        slow.eos_token,
    )
    texts = [case["text"] for case in TEXTS["encode"] if case["text"] != "<0x0A>"]
    assert [fast.encode(text) for text in texts] == [slow.encode(text) for text in texts]
    assert fast.decode(fast.encode("Hello world.")) == "Hello world."
    (tmp_path / "again").mkdir()
    fast.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").encode("Hello") == fast.encode("Hello")


def test_a_tokenizer_json_that_pads_and_cuts_is_settled_before_threads_meet(tmp_path):
    PreTrainedTokenizerFast.from_pretrained(CHECKPOINT).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    plain = Tokenizer.load(tmp_path).encode("Hello world, and more.")
    given = json.loads(file.read_text(encoding="utf-8"))
    given["truncation"] = {"direction": "Right", "max_length": 2, "stride": 0}
    given["truncation"]["strategy"] = "LongestFirst"
    given["padding"] = {"strategy": {"Fixed": 40}, "direction": "Right", "pad_id": 0}
    given["padding"] |= {"pad_to_multiple_of": None, "pad_type_id": 0, "pad_token": "<unk>"}
    file.write_text(json.dumps(given), encoding="utf-8")
    fast = Tokenizer.load(tmp_path)
    backend = fast._hf_tokenizer.backend_tokenizer
    assert backend.truncation is None and backend.padding is None
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: fast.encode("Hello world, and more."), range(64)))
    assert found == [plain] * 64


def files_of(tensors: Iterable[torch.Tensor]) -> list[str]:
    """Return the file that the memory of each tensor is mapped from, "" for memory of its own."""
    maps = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        where, *_, name = line.split(maxsplit=5) if line.count("/") else (line.split()[0], "")
        begin, end = (int(number, 16) for number in where.split("-"))
        maps.append((begin, end, Path(name).name))
    found = []
    for tensor in tensors:
        at = tensor.data_ptr()
        found.append(next(name for begin, end, name in maps if begin <= at < end))
    return found


def test_weights_that_are_mapped_stay_in_their_file(tmp_path):
    config = named_language_config("tiny")
    build_random_language(config).to(torch.bfloat16).save_pretrained(tmp_path)
    mapped = load_language_model(tmp_path, torch.float32, mmap_weights=True)
    own = load_language_model(tmp_path, torch.float32)
    assert set(files_of(mapped.parameters())) == {"model.safetensors"}
    assert "model.safetensors" not in files_of(own.parameters())
    assert mapped.dtype == torch.bfloat16
    for one, other in zip(mapped.parameters(), own.parameters(), strict=True):
        assert torch.equal(one.float(), other)
