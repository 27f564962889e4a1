"""Folders of models as people have them, in both released layouts: read, or named in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_release import (
    ENCODER_FOLDER,
    edit_json,
    load_tensors,
    make_plain_llava,
    rewrite_weights,
)
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

import vlbench
from vlbench.__main__ import main
from vlbench.errors import UserError
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.weights.release_files import collect_part_states

Change = Callable[[Path], object]
ASK = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return one model in both layouts."""
    folder = tmp_path_factory.mktemp("models")
    source = make_plain_llava(folder / "yi_vl", tokens=2)
    words = ["export", f"model={source}", f"out={folder / 'hf_llava'}", "format=hf_llava"]
    assert main(words) == 0
    return {"yi_vl": source, "hf_llava": folder / "hf_llava"}


@pytest.fixture(params=["yi_vl", "hf_llava"])
def model(request, models, tmp_path) -> Path:
    return copied(models[request.param], tmp_path)


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "model"))


def loaded(folder: Path) -> LoadedVLM:
    return vlbench.load(folder, dtype="float32", device="cpu")


def cast(kind: torch.dtype, part: str = "") -> Change:
    def change(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if part in name]:
            state[name] = state[name].to(kind)

    return lambda folder: rewrite_weights(folder, change, "safetensors")


def cast_bin(kind: torch.dtype) -> Change:
    def change(state: dict[str, Tensor]) -> None:
        state |= {name: tensor.to(kind) for name, tensor in state.items() if "mlp" in name}

    return lambda folder: rewrite_weights(folder, change)


def clear(folder: Path) -> dict[str, Tensor]:
    """Take the weights of a folder away, and return them."""
    state = load_tensors(folder)
    for file in [
        *folder.glob("*.safetensors"),
        *folder.glob("*.bin"),
        *folder.glob("*.index.json"),
    ]:
        file.unlink()
    return state


def shard(leave: int | None = None, index: bool = True) -> Change:
    """Write the weights in three shards, all but number `leave`."""

    def change(folder: Path) -> None:
        state, places = clear(folder), {}
        for number in range(3):
            file = f"model-{number + 1:05d}-of-00003.safetensors"
            part = {name: state[name] for name in sorted(state)[number::3]}
            if number != leave:
                save_file(part, folder / file)
            places |= dict.fromkeys(part, file)
        if index:
            text = json.dumps({"metadata": {}, "weight_map": places})
            (folder / "model.safetensors.index.json").write_text(text)

    return change


def both(folder: Path) -> None:
    """Write the weights as safetensors, and other ones as pytorch_model.bin."""
    state = clear(folder)
    save_file(state, folder / "model.safetensors")
    torch.save({name: tensor * 0 for name, tensor in state.items()}, folder / "pytorch_model.bin")


def only_gguf(folder: Path) -> None:
    clear(folder)
    (folder / "ggml-model-q4.gguf").write_bytes(b"GGUF")


READ: dict[str, Change] = {
    "float32": cast(torch.float32),
    "float64": cast(torch.float64),
    "bin shards": lambda folder: rewrite_weights(folder, lambda state: None),
    "safetensors shards": shard(),
    "both kinds of files": both,
    "no tokenizer_config.json": lambda folder: (folder / "tokenizer_config.json").unlink(),
}


@pytest.mark.parametrize("change", READ.values(), ids=READ)
def test_folders_that_say_the_same_hold_the_same(change, model):
    before = collect_part_states(loaded(model).model)
    change(model)
    after = collect_part_states(loaded(model).model)
    assert before.keys() == after.keys() == {"vision", "connector", "language"}
    for part, state in before.items():
        assert state.keys() == after[part].keys()
        for name, tensor in state.items():
            assert torch.equal(tensor, after[part][name]), (part, name)


REFUSED: dict[str, tuple[Change, str]] = {
    "fp8": (cast(torch.float8_e4m3fn), "stored as float8_e4m3fn; quantized weights are not read"),
    "fp8 of another kind": (cast(torch.float8_e5m2, "mlp"), "mlp.* is stored as float8_e5m2"),
    "int8": (cast(torch.int8, "up_proj"), "up_proj.weight is stored as int8"),
    "int8 in a bin": (cast_bin(torch.int8), "is stored as int8"),
    "complex": (cast(torch.complex64, "layers.0.mlp.up_proj"), "is stored as"),
    "a shard is missing": (shard(1), "names model-00002-of-00003.safetensors, which .* not have"),
    "no index of shards": (shard(index=False), "no weights.* it has model-00001-of-00003"),
    "gguf": (only_gguf, "no weights.*; it has ggml-model-q4.gguf"),
    "no weights": (clear, "no weights; wanted is one of"),
    "a text": (
        lambda f: (clear(f), (f / "model.safetensors").write_text("hello world 12345")),
        "torn",
    ),
    "empty": (lambda f: (clear(f), (f / "pytorch_model.bin").write_bytes(b"")), "torn"),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_one_line(change, words, model):
    change(model)
    with pytest.raises(UserError, match=words) as caught:
        loaded(model)
    assert "\n" not in str(caught.value)


def config_change(file: str = "config.json", part: str | None = None, **changes: Any) -> Change:
    def change(folder: Path) -> None:
        config = json.loads((folder / file).read_text())
        (config if part is None else config[part]).update(changes)
        (folder / file).write_text(json.dumps(config))

    return change


def older(folder: Path) -> None:
    """Move the image processor to where transformers 4 wrote it."""
    config = json.loads((folder / "processor_config.json").read_text())
    said = json.dumps(config.pop("image_processor"))
    (folder / "preprocessor_config.json").write_text(said)
    (folder / "processor_config.json").write_text(json.dumps(config))


def processor(**changes: Any) -> Change:
    return config_change("processor_config.json", "image_processor", **changes)


def renamed(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["image_token_id"] = config.pop("image_token_index")
    (folder / "config.json").write_text(json.dumps(config))


NEWER = {"image_processor_type": "CLIPImageProcessorFast", "data_format": "channels_first"}
ACCEPTED: dict[str, Change] = {
    "transformers 4's preprocessor": older,
    "a fast image processor": processor(**NEWER, device=None, input_data_format=None),
    "size as a rectangle": processor(size={"height": 56, "width": 56}),
    "size as a number": processor(size=56, crop_size=56),
    "image_token_id": renamed,
    "text_config without a type": lambda f: edit_json(
        f / "config.json",
        text_config={
            key: value
            for key, value in json.loads((f / "config.json").read_text())["text_config"].items()
            if key != "model_type"
        },
    ),
}


@pytest.mark.parametrize("change", ACCEPTED.values(), ids=ACCEPTED)
def test_small_files_of_other_versions_say_the_same(change, models, tmp_path):
    folder = copied(models["hf_llava"], tmp_path)
    before = loaded(folder)
    change(folder)
    after = loaded(folder)
    assert (
        after.processor.transform == before.processor.transform
        and after.tokenizer.embedding_rows == before.tokenizer.embedding_rows
    )
    assert torch.equal(before(before.prepare(ASK)).logits, after(after.prepare(ASK)).logits)


@pytest.mark.parametrize("resample", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [{"height": 56, "width": 56}, {"shortest_edge": 56}])
def test_pixels_are_those_of_the_folders_own_processor(size, resample, models, tmp_path):
    """Height and width squash an image; one length is its shortest edge, and it is cropped."""
    folder = copied(models["hf_llava"], tmp_path)
    processor(size=size, do_pad=False, resample=resample)(folder)
    picture = Image.effect_noise((90, 60), 80).convert("RGB")
    theirs: Any = AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    pixels = theirs.image_processor(images=[picture], return_tensors="pt")["pixel_values"][0]
    transform = loaded(folder).processor.transform
    assert (transform(picture) - pixels).abs().max() < 1e-5
    words = ["export", f"model={folder}", f"out={tmp_path / 'to'}", "format=hf_llava"]
    assert main(words) == 0
    assert loaded(tmp_path / "to").processor.transform == transform


def test_yi_vls_layout_keeps_how_images_are_resized(models, tmp_path):
    folder = copied(models["yi_vl"], tmp_path)
    edit_json(folder / ENCODER_FOLDER / "preprocessor_config.json", resample=2)
    transform = loaded(folder).processor.transform
    assert transform.interpolation == "bilinear"
    for source, to, layout in ((folder, "hf", "hf_llava"), (tmp_path / "hf", "back", "yi_vl")):
        words = ["export", f"model={source}", f"out={tmp_path / to}", f"format={layout}"]
        assert main(words) == 0
        assert loaded(tmp_path / to).processor.transform == transform


ODD: dict[str, tuple[Change, str]] = {
    "no text_config": (config_change(text_config=None), "config.json has no text_config"),
    "text_config a list": (config_change(text_config=[1]), "text_config is .*wanted is a mapping"),
    "vision_config a text": (config_change(vision_config="clip"), "vision_config is 'clip'"),
    "Mixtral": (config_change(part="text_config", model_type="mixtral"), "is .mixtral."),
    "an id that is none": (config_change(image_token_index="x"), "image_token_index is 'x'"),
    "a negative id": (config_change(image_token_index=-1), "image_token_index is -1"),
    "several layers": (config_change(vision_feature_layer=[-2, -3]), "vision_feature_layer is"),
    "no bias": (config_change(multimodal_projector_bias=False), "only True can be done"),
    "another crop": (processor(crop_size={"height": 28, "width": 28}), "cropped to 28 .* takes 56"),
    "no crop": (processor(crop_size=None), "processor_config.json has no crop_size"),
    "no processor": (
        config_change("processor_config.json", image_processor=[]),
        "image_processor is",
    ),
    "LLaVA-NeXT": (config_change(model_type="llava_next"), "tensor image_newline is missing"),
    "no tokenizer": (
        lambda f: ((f / "tokenizer.json").unlink(), (f / "tokenizer.model").unlink()),
        "no tokenizer file .*tokenizer.model, and no tokenizer.json",
    ),
}


@pytest.mark.parametrize(("change", "words"), ODD.values(), ids=ODD)
def test_odd_small_files_are_one_line(change, words, models, tmp_path):
    folder = copied(models["hf_llava"], tmp_path)
    change(folder)
    with pytest.raises(UserError, match=words) as caught:
        loaded(folder)
    assert "\n" not in str(caught.value)


def test_without_the_sentencepiece_model_the_fast_tokenizer_is_read(models, tmp_path):
    folder = copied(models["hf_llava"], tmp_path)
    before = loaded(folder)
    (folder / "tokenizer.model").unlink()
    after = loaded(folder)
    text = "a<extra_0> b 12 km\n\n 是"
    assert after.tokenizer.encode(text) == before.tokenizer.encode(text)
    assert after.tokenizer.embedding_rows == before.tokenizer.embedding_rows == 1602


def test_every_tensor_of_yi_vls_layout_is_its_files(models):
    files, encoder = load_tensors(models["yi_vl"]), load_tensors(models["yi_vl"] / ENCODER_FOLDER)
    found = collect_part_states(loaded(models["yi_vl"]).model)
    expected = {
        "language": {
            k: v for k, v in files.items() if "mm_projector" not in k and "vision" not in k
        },
        "connector": {k[19:]: v for k, v in files.items() if k.startswith("model.mm_projector.")},
        "vision": {k.removeprefix("vision_model."): v for k, v in encoder.items()},
    }
    for part, state in expected.items():
        assert state.keys() == found[part].keys() and len(state) >= 4
        for name, tensor in state.items():
            assert torch.equal(tensor.float(), found[part][name]), (part, name)


def test_every_tensor_of_transformers_llava_is_its_files(models):
    theirs = LlavaForConditionalGeneration.from_pretrained(models["hf_llava"]).state_dict()
    found = collect_part_states(loaded(models["hf_llava"]).model)
    projector = {"0": "linear_1", "2": "linear_2"}
    names = {}
    for part, state in found.items():
        for key, tensor in state.items():
            layer, _, kind = key.partition(".")
            name = {
                "vision": f"model.vision_tower.{key}",
                "connector": f"model.multi_modal_projector.{projector.get(layer)}.{kind}",
                "language": key.replace("model.", "model.language_model.", 1),
            }[part]
            name = name if name in theirs else name.replace("tower.", "tower.vision_model.")
            assert torch.equal(tensor, theirs[name].float()), name
            names[name] = key
    assert names.keys() == theirs.keys()


def test_an_encoder_of_another_name_is_told_and_of_several_none_is_taken(models, tmp_path, capsys):
    """Both CLIPs of LLaVA are as wide: with the other one a model answers, and wrongly."""
    folder = copied(models["yi_vl"], tmp_path)
    loaded(folder)
    assert "the only one" not in capsys.readouterr().err
    (folder / ENCODER_FOLDER).rename(folder / "vit/clip-vit-large-patch14")
    named = "openai/clip-vit-large-patch14-336"
    edit_json(folder / "config.json", mm_vision_tower=named)
    loaded(folder)
    (line,) = [one for one in capsys.readouterr().err.splitlines() if "the only one" in one]
    assert "vit/clip-vit-large-patch14, the only one" in line and named in line
    shutil.copytree(folder / "vit/clip-vit-large-patch14", folder / "vit/another")
    with pytest.raises(UserError, match=r"in vit/ there are another, clip-vit-large-patch14$"):
        loaded(folder)
