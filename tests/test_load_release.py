"""Released folders differ, and are broken in many ways: all are loaded, or named in one line."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden_release import (
    CASES,
    CHECKPOINT,
    ENCODER_FOLDER,
    case_messages,
    copy_checkpoint,
    edit_json,
    load_tensors,
    rewrite_weights,
)
from torch import Tensor

import vlbench
from vlbench.__main__ import main
from vlbench.errors import UserError
from vlbench.model.weights import tensor_files, tensor_writer, yi_vl_layout
from vlbench.model.weights.export_yi_vl import write_yi_vl

CASE = CASES["cases"][0]
LAYER = "model.layers.1.mlp.up_proj.weight"


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    vlm = vlbench.load(folder, dtype="float32", device="cpu")
    return vlm(vlm.prepare(case_messages(CASE))).logits[0]


EXPECTED = logits(CHECKPOINT)


def drop_encoder(state: dict) -> None:
    for name in [name for name in state if "vision_tower" in name]:
        del state[name]


def stale_encoder(state: dict) -> None:
    for name in [name for name in state if "vision_tower" in name]:
        state[name] = torch.full_like(state[name], 7.0)


def with_buffers(state: dict) -> None:
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)


def whole_clip(state: dict) -> None:
    state["text_model.embeddings.token_embedding.weight"] = torch.ones(3, 4)
    state["logit_scale"] = torch.ones(())
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]


def without_prefix(state: dict) -> None:
    for name in list(state):
        state[name.removeprefix("vision_model.")] = state.pop(name)


def in_float32(state: dict) -> None:
    for name in list(state):
        state[name] = state[name].float()


SAME = {
    "bin shards": lambda folder: rewrite_weights(folder, lambda state: None),
    "one safetensors": lambda folder: rewrite_weights(folder, lambda state: None, "safetensors"),
    "no copy of the encoder": lambda folder: rewrite_weights(folder, drop_encoder),
    "a stale copy of the encoder": lambda folder: rewrite_weights(
        folder, stale_encoder, "safetensors"
    ),
    "buffers": lambda folder: rewrite_weights(folder, with_buffers),
    "a float32 encoder": lambda folder: rewrite_weights(
        folder / ENCODER_FOLDER, in_float32, "safetensors"
    ),
    "an encoder written by transformers 5": lambda folder: rewrite_weights(
        folder / ENCODER_FOLDER, without_prefix
    ),
    "a whole CLIP": lambda folder: rewrite_weights(folder / ENCODER_FOLDER, whole_clip),
    "a Mistral without a window": lambda folder: edit_json(
        folder / "config.json", model_type="llava_mistral", sliding_window=4096
    ),
    "sizes of old": lambda folder: edit_json(
        folder / ENCODER_FOLDER / "preprocessor_config.json",
        **{"size": 56, "crop_size": 56, "do_rescale": None, "do_convert_rgb": None},
    ),
    "a nested config": lambda folder: (folder / ENCODER_FOLDER / "config.json").write_text(
        json.dumps(
            {
                "model_type": "clip",
                "vision_config": json.loads((folder / ENCODER_FOLDER / "config.json").read_text()),
            }
        )
    ),
    "an absolute path of another machine": lambda folder: edit_json(
        folder / "config.json", mm_vision_tower=f"/elsewhere/{ENCODER_FOLDER}"
    ),
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_folders_that_say_the_same_give_the_same(change, tmp_path):
    folder = copy_checkpoint(tmp_path / "model")
    change(folder)
    assert torch.equal(logits(folder), EXPECTED)


COPIED_TOKEN = "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"
TRAINED = {
    "LLaVA": {"unfreeze_mm_vision_tower": True},
    "LLaVA-NeXT": {"mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter"},
}


@pytest.mark.parametrize("said", TRAINED.values(), ids=TRAINED)
def test_an_encoder_that_was_trained_is_the_one_beside_the_language_model(said, tmp_path):
    """LLaVA's code reads it there; its folder has what the training began with."""
    folder = copy_checkpoint(tmp_path / "model")
    edit_json(folder / "config.json", **said)
    encoder = load_tensors(folder / ENCODER_FOLDER)

    def train_encoder(state: dict) -> None:
        for name, tensor in encoder.items():
            key = name.removeprefix("vision_model.")
            state[f"model.vision_tower.vision_tower.vision_model.{key}"] = 2 * tensor

    rewrite_weights(folder, train_encoder)
    vlm = vlbench.load(folder, dtype="float32", device="cpu")
    trained = 2 * encoder["vision_model.embeddings.class_embedding"].float()
    assert vlm.vision.visual.class_embedding.equal(trained)
    for name, source in (("unchanged", folder), ("changed", None)):
        (tmp_path / name).mkdir()
        write_yi_vl(vlm, tmp_path / name, None, source)
        back = vlbench.load(tmp_path / name, dtype="float32", device="cpu")
        assert back.vision.visual.class_embedding.equal(trained)
    written = json.loads((tmp_path / "changed/config.json").read_text())
    assert not any(written[key] for key in said)  # LLaVA's code, too, reads the folder now
    assert COPIED_TOKEN not in load_tensors(tmp_path / "changed")
    assert load_tensors(tmp_path / "unchanged").keys() == load_tensors(folder).keys()


def test_the_stored_type_is_kept_when_asked_for():
    vlm = vlbench.load(CHECKPOINT, dtype="bf16")
    assert {p.dtype for p in vlm.parameters()} == {torch.bfloat16}
    assert vlm.language.model.rotary_emb.inv_freq.dtype == torch.float32
    assert vlm(vlm.prepare(case_messages(CASE))).logits.isfinite().all()
    assert {p.dtype for p in vlbench.load(CHECKPOINT, device="cpu").parameters()} == {torch.float32}


def test_a_crop_smaller_than_the_resize_cuts_the_border(tmp_path):
    folder = copy_checkpoint(tmp_path / "model")
    edit_json(folder / ENCODER_FOLDER / "preprocessor_config.json", size={"shortest_edge": 64})
    vlm = vlbench.load(folder)
    assert (vlm.processor.transform.size, vlm.processor.transform.crop) == (64, 56)
    assert vlm.prepare(case_messages(CASE)).pixels.shape[-2:] == (56, 56)
    vlm.set_image_size(112)
    assert (vlm.processor.transform.size, vlm.processor.transform.crop) == (128, 112)


def test_rows_beyond_the_tokenizer_are_never_written(tmp_path):
    folder = copy_checkpoint(tmp_path / "model")

    def pad(state: dict) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            state[name] = torch.cat([state[name], 100 * torch.ones(64, 64, dtype=torch.bfloat16)])

    rewrite_weights(folder, pad)
    edit_json(folder / "config.json", vocab_size=1664)
    assert torch.equal(logits(folder)[:, :1600], EXPECTED)
    vlm = vlbench.load(folder)
    vlm.language.lm_head.weight.data[1600:] = 1e3 * vlm.language.lm_head.weight.data[:1].sign()
    new = vlm.generate(vlm.prepare(case_messages(CASE)), max_new_tokens=16)[0]
    assert max(new) < 1600


def test_a_token_without_an_embedding_is_refused_where_it_is_typed(tmp_path):
    folder = copy_checkpoint(tmp_path / "model")
    (folder / "added_tokens.json").write_text('{"<extra>": 1600, "<more>": 1601}')
    vlm = vlbench.load(folder)
    assert vlm.tokenizer.vocab_size == 1602 and vlm.tokenizer.encode("a<extra>")[-1] == 1600
    assert torch.equal(logits(folder), EXPECTED)
    with pytest.raises(UserError, match="'<extra>'.*1600 embeddings"):
        vlm.prepare([{"role": "user", "content": "What is <extra>?"}])


def test_a_leading_bos_is_kept_once(tmp_path):
    folder = copy_checkpoint(tmp_path / "model")
    edit_json(folder / "tokenizer_config.json", add_bos_token=True)
    ids = vlbench.load(folder).prepare(case_messages(CASE)).input_ids[0]
    assert ids[0] == 1 and (ids == 1).sum() == 1
    assert ids[1:].equal(vlbench.load(CHECKPOINT).prepare(case_messages(CASE)).input_ids[0])


class Bomb:
    """An object whose unpickling writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.write_text, (self.path, "executed")


def poison(folder: Path) -> None:
    torch.save({"x": Bomb(folder / "bomb")}, folder / ENCODER_FOLDER / "pytorch_model.bin")


def poison_plainly(folder: Path) -> None:
    text = pickle.dumps({"x": Bomb(folder / "bomb")}, protocol=2)
    (folder / ENCODER_FOLDER / "pytorch_model.bin").write_bytes(text)


def cut(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return change


def state_change(change: Callable[[dict], object], where: str = ".") -> Callable[[Path], None]:
    return lambda folder: rewrite_weights(folder / where, lambda state: (change(state), None)[1])


def config_change(where: str = ".", **changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / where / "config.json", **changes)


SHARD = "model-00003-of-00007.safetensors"
BROKEN = {
    "torn shard": (cut(SHARD), rf"{SHARD} is torn"),
    "torn encoder": (cut(f"{ENCODER_FOLDER}/pytorch_model.bin"), "pytorch_model.bin .*torn"),
    "lost shard": (lambda f: (f / SHARD).unlink(), f"index.json names {SHARD}"),
    "lost encoder": (
        lambda f: (f / ENCODER_FOLDER / "pytorch_model.bin").unlink(),
        "has no weights",
    ),
    "code in a file of torch": (poison, "never executed"),
    "code in a plain pickle": (poison_plainly, "never executed"),
    "missing": (state_change(lambda s: s.pop(LAYER)), f"{LAYER} is missing$"),
    "missing in the encoder": (
        state_change(
            lambda s: s.pop("vision_model.encoder.layers.2.self_attn.k_proj.bias"), ENCODER_FOLDER
        ),
        "vision_model.encoder.layers.2.self_attn.k_proj.bias is missing",
    ),
    "missing projector": (
        state_change(lambda s: s.pop("model.mm_projector.3.bias")),
        "model.mm_projector.3.bias is missing",
    ),
    "surplus": (
        state_change(lambda s: s.update({"model.layers.9.x": torch.ones(2)})),
        "model.layers.9.x belongs to nothing",
    ),
    "mis-shaped": (
        state_change(lambda s: s.update({LAYER: s[LAYER][:5]})),
        rf"{LAYER} has shape \(5, 64\), needed is \(172, 64\)",
    ),
    "not a tensor file": (
        lambda f: torch.save([1, 2], f / ENCODER_FOLDER / "pytorch_model.bin"),
        "mapping from names to tensors",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "no released model"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "no width": (config_change(hidden_size=None), "config.json has no hidden_size"),
    "heads": (config_change(num_attention_heads=7), "config.json: .*heads"),
    "layers": (config_change(num_hidden_layers=4), "model.layers.3.*is missing"),
    "projector": (config_change(mm_projector_type="qformer"), "mm_projector_type is 'qformer'"),
    "select layer": (config_change(mm_vision_select_layer=-9), "mm_vision_select_layer is -9"),
    "class token": (config_change(mm_vision_select_feature="cls_patch"), "only 'patch'"),
    "tiles": (config_change(image_aspect_ratio="anyres"), "is 'anyres'; .*llava_next"),
    "another family": (config_change(model_type="llava_gemma"), "model_type is 'llava_gemma'; in"),
    "a window": (
        config_change(model_type="llava_mistral", sliding_window=16),
        "sliding_window is 16 of 4096 positions",
    ),
    "an aspect of another kind": (config_change(image_aspect_ratio=["pad"]), r"is \['pad'\]; "),
    "no encoder": (
        lambda f: (
            edit_json(f / "config.json", mm_vision_tower="./vit/x"),
            (f / ENCODER_FOLDER).rename(f / "y"),
        ),
        "mm_vision_tower is './vit/x'",
    ),
    "activation": (config_change(ENCODER_FOLDER, hidden_act="relu6"), "hidden_act is 'relu6'"),
    "resample": (
        lambda f: edit_json(f / ENCODER_FOLDER / "preprocessor_config.json", resample=4),
        r"resample is 4; known are 0 \(nearest\), 1 \(lanczos\), 2 \(bilinear\), 3 \(bicubic\)",
    ),
    "crop": (
        lambda f: edit_json(f / ENCODER_FOLDER / "preprocessor_config.json", crop_size=28),
        "cropped to 28 pixels .*, but the vision encoder takes 56",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "no tokenizer file"),
    "no end of text": (
        lambda f: edit_json(f / "tokenizer_config.json", eos_token="</s>"),
        "role for the token '</s>', which it does not hold",
    ),
    "path out": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            '{"weight_map": {"x": "../../secret.bin"}}'
        ),
        "outside of its folder",
    ),
}


@pytest.mark.parametrize(("change", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_folder_is_one_clear_line(change, words, tmp_path):
    folder = copy_checkpoint(tmp_path / "model")
    change(folder)
    with pytest.raises(UserError, match=words) as caught:
        vlbench.load(folder)
    assert len(str(caught.value).splitlines()) == 1
    assert not (folder / "bomb").exists()


@pytest.mark.parametrize(("aspect", "pad"), [("pad", True), ("square", False), (None, False)])
def test_an_image_is_padded_or_cropped_as_the_release_says(aspect, pad, tmp_path):
    folder = copy_checkpoint(tmp_path / "model")
    edit_json(folder / "config.json", image_aspect_ratio=aspect)
    assert yi_vl_layout.read_release_spec(folder).preprocess["pad"] is pad


def test_shards_are_written_with_an_index_and_read_back(tmp_path):
    state = {f"t{n}": torch.randn(100, 10) for n in range(7)}
    tensor_writer.write_tensors(state.items(), tmp_path, max_shard_bytes=10_000)
    files = tensor_files.weight_files(tmp_path)
    assert [file.name for file in files] == [
        f"model-{n:05d}-of-00004.safetensors" for n in range(1, 5)
    ]
    back = {name: tensor for file in files for name, tensor in tensor_files.read_tensors(file)}
    assert all(torch.equal(state[name], back[name]) for name in state)
    assert tensor_files.stored_dtype_and_numel(tmp_path) == (torch.float32, 7000)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_tensor_that_was_read_does_not_hang_on_its_file(kind, tmp_path):
    file = tmp_path / f"model.{kind}"
    first = torch.arange(6.0)
    if kind == "bin":
        torch.save({"a": first}, file)
    else:
        tensor_writer.write_tensors([("a", first)], tmp_path)
    ((_, tensor),) = tensor_files.read_tensors(file)
    file.write_bytes(b"\0" * file.stat().st_size)  # a mapped tensor would change with its file
    assert torch.equal(tensor, first)


def test_an_encoder_outside_of_the_folder_is_found_and_moves_in(tmp_path):
    folder = copy_checkpoint(tmp_path / "model")
    (folder / ENCODER_FOLDER).rename(tmp_path / "encoder")
    edit_json(folder / "config.json", mm_vision_tower=str(tmp_path / "encoder"))
    assert torch.equal(logits(folder), EXPECTED)
    assert "vit/encoder/preprocessor_config.json" in vlbench.load(folder).release_files


def test_an_export_never_writes_into_what_it_was_read_from(tmp_path, monkeypatch):
    """An encoder beside the folder (`../shared`) is copied into the export, and stays as it was."""
    monkeypatch.chdir(tmp_path)
    source = copy_checkpoint(tmp_path / "model")
    (tmp_path / "shared").mkdir()
    (source / ENCODER_FOLDER).rename(tmp_path / "shared/encoder")
    edit_json(source / "config.json", mm_vision_tower="../shared/encoder")
    before = sorted((tmp_path / "shared").rglob("*"))
    words = ["only=chat", "run=run", "stages.chat.image_size=56", "stages.chat.global_batch_size=4"]
    words += ["stages.chat.steps=1", "log.questions=2", "log.tensorboard=false", "log.examples=0"]
    assert main(["fit", "recipe=yivl_llava", "init=model", *words]) == 0
    for origin, to in (("run", "trained"), ("model", "unchanged")):
        assert main(["export", f"model={origin}", f"out={to}", "format=yi_vl"]) == 0
        assert (tmp_path / to / "vit/encoder/model.safetensors").is_file()
        assert torch.equal(logits(tmp_path / to), logits(tmp_path / origin))
    assert sorted((tmp_path / "shared").rglob("*")) == before


def test_a_run_that_is_missing_or_has_no_checkpoint_is_told_with_what_is_near(tmp_path):
    runs = tmp_path / "runs"
    (runs / "llava" / "checkpoints").mkdir(parents=True)
    (runs / "emptied").mkdir()
    for name in ("recipe.yaml", "versions.json"):
        (runs / "emptied" / name).write_text("{}")
    for path, words in (
        (runs / "llava", "is a run without a checkpoint"),
        (runs / "emptied", "emptied/checkpoints was emptied since"),
        (runs / "lava", "Did you mean 'llava'?"),
        (runs, "there are in it: emptied, llava"),
    ):
        with pytest.raises(UserError) as caught:
            vlbench.load(path)
        assert words in str(caught.value)
