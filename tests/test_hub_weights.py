"""Every loader loads what the hub holds: encoders by tag, language models, BERT, references.

The encoders are the real architectures, two blocks deep; names of repositories and files are those
that open_clip and transformers ask for.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub import reference_weights
from hub.client import go_offline, visit_hub
from hub.model_repositories import build_open_clip, make_repositories
from hub.random_weights import write_weights
from hub.server import FakeHub, serve_hub
from hub.shallow_encoders import shallow_encoders
from hub.weight_comparison import (
    assert_language_model,
    assert_same_state,
    assert_vision_encoder,
    load_tensors,
    matching_files,
)

import vlbench
from vlbench.connector.base import Shapes
from vlbench.connector.registry import load_connector
from vlbench.data.tokenizer import Tokenizer
from vlbench.errors import UserError
from vlbench.model.language_model import build_language_model, language_folder
from vlbench.model.vision_encoder import build_vision_encoder
from vlbench.model.weights.clip_layouts import to_hf_state_dict

SAFE, BIN = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"
VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
TAGS = {
    ("ViT-H-14", "laion2b_s32b_b79k"): VIT_H,
    ("EVA02-L-14-336", "merged2b_s6b_b61k"): "timm/eva02_large_patch14_clip_336.merged2b_s6b_b61k",
    ("ViT-B-32-SigLIP2-256", "webli"): "timm/ViT-B-32-SigLIP2-256",
    ("ViT-B-32-quickgelu", "openai"): "timm/vit_base_patch32_clip_224.openai",
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    """The hub, and encoders two blocks deep."""
    folder = tmp_path_factory.mktemp("hub")
    with shallow_encoders(), serve_hub(make_repositories(folder)) as hub:
        yield hub
    shutil.rmtree(folder)  # a gigabyte


@pytest.fixture
def hub(served: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """The hub, from which nothing has been fetched yet."""
    return visit_hub(monkeypatch, served, tmp_path)


@pytest.mark.parametrize(("name", "tag"), TAGS)
def test_a_tag_is_the_file_on_the_hub(name, tag, hub, monkeypatch):
    repository = TAGS[name, tag]
    file = hub[repository].files[SAFE].path
    encoder = build_vision_encoder(name, tag)
    assert_vision_encoder(encoder.visual, file)
    assert hub.fetched() == {repository: {SAFE}}  # of the same weights in several files, one
    hub.forget()
    go_offline(monkeypatch)
    encoder = build_vision_encoder(name, tag)
    encoder.set_image_size(2 * encoder.image_size)
    assert_vision_encoder(encoder.visual, file)
    assert not hub.log


def test_torchs_file_is_taken_where_there_is_no_other(hub):
    files = hub[VIT_H].files
    kept = files.pop(SAFE)
    try:
        assert_vision_encoder(
            build_vision_encoder("ViT-H-14", "laion2b_s32b_b79k").visual, files[BIN].path
        )
        assert hub.fetched() == {VIT_H: {BIN}}
    finally:
        files[SAFE] = kept


@pytest.mark.parametrize("form", [SAFE, BIN, "", "vision folder"])
def test_a_file_or_folder_of_the_repository_is_the_same_encoder(form, hub, tmp_path):
    """Of LAION's repository: either file of open_clip, the folder, its Hugging Face half alone."""
    folder = hub[VIT_H].folder
    if form != "vision folder":
        encoder = build_vision_encoder("ViT-H-14", str(folder / form))
        assert_vision_encoder(encoder.visual, folder / SAFE)
        return
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (tmp_path / name).symlink_to(folder / name)
    encoder = build_vision_encoder("ViT-H-14", str(tmp_path))
    stored = load_tensors([folder / "model.safetensors"])
    theirs = {k.removeprefix("vision_model."): v for k, v in stored.items() if "vision_model" in k}
    assert_same_state(to_hf_state_dict(encoder.visual), theirs)


def test_an_encoder_of_another_seed_would_be_noticed(hub, tmp_path):
    _, other = build_open_clip("ViT-B-32-quickgelu", 99)
    write_weights(other, tmp_path / "other.safetensors")
    encoder = build_vision_encoder("ViT-B-32-quickgelu", "openai")
    with pytest.raises(AssertionError):
        assert_vision_encoder(encoder.visual, tmp_path / "other.safetensors")


def test_a_hub_that_fails_is_not_asked_for_another_file(hub):
    """The file that is preferred is there, and cannot be had now: no other one is taken for it."""
    hub.fail(SAFE, 503, times=99)
    with pytest.raises(UserError, match="status 503"):
        build_vision_encoder("ViT-H-14", "laion2b_s32b_b79k")
    assert not hub.fetched()


def test_a_tag_that_is_refused_is_one_line(hub):
    hub.fail(VIT_H, 503, times=99)
    with pytest.raises(
        UserError, match="laion2b_s32b_b79k: .*status 503.*try again later"
    ) as found:
        build_vision_encoder("ViT-H-14", "laion2b_s32b_b79k")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", ["01-ai/Yi-6B-Chat", "01-ai/Yi-34B-Chat"])
def test_a_language_model_is_its_shards(name, hub):
    language = build_language_model("yi-6b", name)
    assert_language_model(language, hub[name].folder)
    assert language.generation_config.eos_token_id == [2, 7]
    assert Tokenizer.load(language_folder(name)).encode("<|endoftext|>") == [2]
    assert set(hub.fetched()) == {name}


def test_yi_vl_is_its_shards_and_its_encoder(hub):
    vlm = vlbench.load("01-ai/Yi-VL-6B")
    folder = hub["01-ai/Yi-VL-6B"].folder
    assert_language_model(vlm.language, folder)
    encoder = load_tensors(matching_files(folder, "vit/*/pytorch_model.bin"))
    theirs = {k.removeprefix("vision_model."): v for k, v in encoder.items()}
    own = to_hf_state_dict(vlm.vision.visual)
    assert_same_state(own, {name: tensor for name, tensor in theirs.items() if name in own})
    stored = load_tensors(matching_files(folder, "model*.safetensors"))
    start = "model.mm_projector."
    projector = {k.removeprefix(start): v for k, v in stored.items() if k.startswith(start)}
    assert_same_state(vlm.connector.released_projector().state_dict(), projector)


def test_the_first_stage_begins_as_bert(hub):
    shapes = Shapes(16, (4, 4), 32, 64, 4)
    one = load_connector("qformer")(
        shapes, queries=3, layers=2, text="bert-base-uncased", itc_width=8
    )
    one.prepare_objective("blip2", fresh=True)
    assert hub.fetched() == {
        "google-bert/bert-base-uncased": {
            *("config.json", "model.safetensors", "tokenizer_config.json", "vocab.txt")
        }
    }
    own = one.state_dict()
    theirs = load_tensors([hub["google-bert/bert-base-uncased"].folder / "model.safetensors"])
    for layer in range(reference_weights.BERT_LAYERS):
        inside, there = f"qformer.encoder.layer.{layer}", f"bert.encoder.layer.{layer}"
        pairs = {
            "attention.attention.query.weight": "attention.self.query.weight",
            "attention.output.LayerNorm.bias": "attention.output.LayerNorm.beta",
            "output.dense.weight": "output.dense.weight",
            "output_query.dense.weight": "output.dense.weight",
            "output_query.LayerNorm.weight": "output.LayerNorm.gamma",
            "intermediate_query.dense.bias": "intermediate.dense.bias",
        }
        for ours, its in pairs.items():
            assert own[f"{inside}.{ours}"].equal(theirs[f"{there}.{its}"]), ours
    words = theirs["bert.embeddings.word_embeddings.weight"]
    assert own["text.embeddings.word_embeddings.weight"][: len(words)].equal(words)
    assert own["qformer.layernorm.weight"].equal(theirs["bert.embeddings.LayerNorm.gamma"])
    ids, _ = one.text.caption_tokenizer(["a red star"], 8)
    assert ids[0].tolist()[:5] == [2, 5, 8, 9, 3]


def test_blip2_is_its_shards(hub):
    repository = hub["Salesforce/blip2-opt-2.7b"]
    one = reference_weights.tiny_connector("qformer").to_empty(device="cpu")
    stored = load_tensors(matching_files(repository.folder, "model*.safetensors"))
    one.load_reference(stored)
    names = {"language_projection": "projection", "vision_model.post_layernorm": "ln_vision"}
    theirs = {}
    for name, tensor in stored.items():
        for old, new in names.items():
            name = name.replace(old, new)
        theirs[name] = tensor
    own = one.state_dict()
    assert_same_state(own, {name: theirs[name] for name in own})


def test_open_flamingo_is_its_checkpoint(hub):
    from huggingface_hub import hf_hub_download

    file = Path(hf_hub_download("openflamingo/OpenFlamingo-3B-vitl-mpt1b", "checkpoint.pt"))
    one = reference_weights.tiny_connector("flamingo").to_empty(device="cpu")
    place = torch.randn(len(one.image_embedding))
    one.image_embedding.data.copy_(place)
    stored = load_tensors([file])
    one.load_reference(stored)
    theirs = {
        name.replace("lang_encoder.transformer.", "").replace("gated_cross_attn_layer.", ""): tensor
        for name, tensor in stored.items()
        if "wte" not in name
    }
    assert_same_state(one.state_dict(), {**theirs, "image_embedding": place})


def test_a_projector_of_llava_is_its_file(hub):
    from huggingface_hub import hf_hub_download

    name = "liuhaotian/llava-v1.5-mlp2x-336px-pretrain-vicuna-7b-v1.5"
    stored = load_tensors([Path(hf_hub_download(name, "mm_projector.bin"))])
    shapes = replace(Shapes(16, (4, 4), 32, 64, 4), vision_width=128, lm_width=128)
    one = load_connector("llava_mlp")(shapes, norm=False)
    one.load_reference(stored)
    theirs = {k.removeprefix("model.mm_projector."): v for k, v in stored.items()}
    assert_same_state(one.released_projector().state_dict(), theirs)
