"""Weights of the vision encoder: each tensor is the file's in every form; nothing else passes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from golden_release import edit_json
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

import vlbench
from vlbench.__main__ import main
from vlbench.errors import UserError
from vlbench.model.named_encoder import named_encoder_folder, resolve_encoder_config
from vlbench.model.vision_config import read_vision_config, resolve_vision_config
from vlbench.model.vision_encoder import VisionEncoder, build_vision_encoder, check_vision_weights
from vlbench.model.weights.weight_origin import hash_named_tensors

NAME = "ViT-S-32"
TAG = {"hf_hub": "owner/some-clip/", "mean": (0.5,) * 3, "std": (0.25,) * 3, "url": ""}
SIGLIP = "ViT-B-16-SigLIP"


@pytest.fixture(scope="module")
def clip_state() -> dict[str, Tensor]:
    """Return the state of a whole CLIP of open_clip, text encoder included, with random weights."""
    torch.manual_seed(5)
    return dict(open_clip.create_model(NAME).state_dict())


@pytest.fixture(scope="module")
def forms(clip_state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the same CLIP as files and folders in every form that people have."""
    folder = tmp_path_factory.mktemp("forms")
    save_file(clip_state, folder / "clip.safetensors")
    torch.save(clip_state, folder / "clip.bin")
    training = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in clip_state.items()}}
    torch.save(training, folder / "epoch_3.pt")
    alone = {k.removeprefix("visual."): v for k, v in visual(clip_state).items()}
    save_file(alone, folder / "encoder.safetensors")
    model = {"model_cfg": open_clip.get_model_config(NAME), "preprocess_cfg": {}}
    for name, kind in (("open_clip_model.safetensors", "safetensors"), (BIN, "bin")):
        (folder / f"as_{kind}").mkdir()
        shutil.copy(folder / f"clip.{kind}", folder / f"as_{kind}" / name)
        (folder / f"as_{kind}/open_clip_config.json").write_text(json.dumps(model))
    (folder / "bare").mkdir()
    shutil.copy(folder / "clip.bin", folder / "bare" / BIN)
    return folder


BIN = "open_clip_pytorch_model.bin"
FORMS = ("clip.safetensors", "clip.bin", "epoch_3.pt", "encoder.safetensors")
FORMS += ("as_safetensors", "as_bin", "bare")


def visual(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith("visual.")}


def assert_same(encoder: VisionEncoder, state: dict[str, Tensor]) -> None:
    """Compare every tensor of an encoder with those of a CLIP."""
    found = {f"visual.{name}": tensor for name, tensor in encoder.visual.state_dict().items()}
    expected = visual(state)
    assert found.keys() == expected.keys() and len(found) > 100
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_weights_is_the_same_encoder(form, forms, clip_state):
    assert_same(build_vision_encoder(NAME, str(forms / form)), clip_state)


def test_a_folder_names_itself(forms, clip_state):
    for weights in ("embedded", str(forms / "as_bin")):
        assert_same(build_vision_encoder(str(forms / "as_bin"), weights), clip_state)


def serve(monkeypatch: pytest.MonkeyPatch, folder: Path, asked: list[str], **tag: object) -> None:
    """Let a tag of open_clip mean a repository that has the files of `folder`."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    def download(repository: str, name: str, local_files_only: bool) -> str:
        asked.append(f"{repository}/{name}")
        if (folder / name).is_file():
            return str(folder / name)
        raise EntryNotFoundError(f"404: no {name}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    tags = open_clip.pretrained._PRETRAINED
    monkeypatch.setitem(tags, NAME, {"some_tag": {**TAG, **tag}})


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_tag_is_what_its_repository_has(kind, forms, clip_state, monkeypatch):
    asked: list[str] = []
    serve(monkeypatch, forms / f"as_{kind}", asked)
    encoder = build_vision_encoder(NAME, "some_tag")
    assert_same(encoder, clip_state)
    assert asked[0] == "owner/some-clip/open_clip_model.safetensors"
    assert (encoder.mean, encoder.std) == ((0.5,) * 3, (0.25,) * 3)


def test_a_tag_for_the_other_activation_is_refused(forms, monkeypatch):
    serve(monkeypatch, forms, [], quick_gelu=True)
    with pytest.raises(UserError, match=f"QuickGELU.*say vision.name={NAME}-quickgelu"):
        build_vision_encoder(NAME, "some_tag")


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14", "ViT-H-14-378"])
def test_every_tag_of_open_clip_meets_its_activation_or_is_refused(name):
    for tag in open_clip.list_pretrained_tags_by_model(name):
        wanted = bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"))
        if wanted:
            with pytest.raises(UserError, match="quickgelu"):
                resolve_vision_config(name, tag)
            assert resolve_vision_config(f"{name}-quickgelu", tag).quick_gelu
        else:
            assert not resolve_vision_config(name, tag).quick_gelu


def test_a_folder_says_its_own_activation_and_pixels(forms, tmp_path):
    folder = Path(shutil.copytree(forms / "as_safetensors", tmp_path / "own"))
    said = json.loads((folder / "open_clip_config.json").read_text())
    said["preprocess_cfg"] = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (folder / "open_clip_config.json").write_text(json.dumps(said))
    encoder = build_vision_encoder(NAME, str(folder))
    assert (encoder.mean, encoder.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    by_file = build_vision_encoder(NAME, str(folder / "open_clip_model.safetensors"))
    assert by_file.transform == encoder.transform
    said["model_cfg"]["quick_gelu"] = True
    (folder / "open_clip_config.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match="quick_gelu True for False.*say vision.name="):
        build_vision_encoder(NAME, str(folder))
    with pytest.raises(UserError, match="quick_gelu True for False.*say vision.name="):
        build_vision_encoder(NAME, str(folder / "open_clip_model.safetensors"))
    own = build_vision_encoder(str(folder), "embedded")
    pixels = torch.randn(1, 3, 224, 224)
    assert not torch.allclose(own(pixels), encoder(pixels), atol=1e-3)  # another activation


def test_pixels_of_a_file_are_those_of_all_tags_of_its_architecture():
    assert resolve_vision_config(SIGLIP, "random").mean == (0.5, 0.5, 0.5)
    assert resolve_vision_config("ViT-L-14", "random").mean == open_clip.OPENAI_DATASET_MEAN


def test_a_siglip_is_loaded_at_the_size_of_its_file(tmp_path, monkeypatch):
    """timm's position embeddings have no class token, and are as long as the file's images."""
    small = open_clip.get_model_config(SIGLIP)
    small["vision_cfg"] |= {"timm_model_name": "vit_tiny_patch16_224", "image_size": 224}
    small["vision_cfg"] |= {"timm_pool": "avg"}
    small["embed_dim"] = 192
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-Ti-16", small)
    torch.manual_seed(1)
    theirs = build_vision_encoder("ViT-Ti-16", "random")
    theirs.set_image_size(96)
    state = {f"visual.{key}": value for key, value in theirs.visual.state_dict().items()}
    save_file(state, tmp_path / "siglip.safetensors")
    ours = build_vision_encoder("ViT-Ti-16", str(tmp_path / "siglip.safetensors"))
    assert ours.image_size == 96
    assert_same(ours, state)


def test_a_file_of_as_many_patches_leaves_an_image_size_that_is_not_whole_patches(tmp_path):
    """As of SigLIP's so400m at 384 pixels, in patches of 14."""
    said = {"model_cfg": {"embed_dim": 32, "vision_cfg": {"image_size": 44, "patch_size": 14}}}
    said["model_cfg"]["vision_cfg"] |= {"layers": 2, "width": 32, "head_width": 16}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(said))
    made = build_vision_encoder(str(tmp_path), "random")
    save_file(made.visual.state_dict(), tmp_path / "open_clip_model.safetensors")
    encoder = build_vision_encoder(str(tmp_path), "embedded")
    assert (encoder.image_size, encoder.grid) == (44, (3, 3))
    encoder.set_image_size(44)
    with pytest.raises(UserError, match="a multiple of 14"):
        encoder.set_image_size(45)


def test_a_file_of_another_image_size_is_resized_once_as_open_clip_does(clip_state, tmp_path):
    state = dict(clip_state)
    key = "visual.positional_embedding"
    state[key] = torch.randn(1 + 12 * 12, 384)
    save_file(state, tmp_path / "at_384.safetensors")
    encoder = build_vision_encoder(NAME, str(tmp_path / "at_384.safetensors"))
    assert encoder.image_size == 384 and torch.equal(
        encoder.visual.positional_embedding, state[key]
    )
    encoder.set_image_size(224)
    theirs = open_clip.create_model(NAME)
    open_clip.load_checkpoint(theirs, str(tmp_path / "at_384.safetensors"))
    assert torch.equal(encoder.visual.positional_embedding, theirs.visual.positional_embedding)


def test_a_folder_of_both_layouts_is_read_by_the_weights_that_it_has(forms, clip_state, tmp_path):
    config = CLIPVisionConfig(
        hidden_size=384, intermediate_size=1536, num_attention_heads=6, patch_size=32,
        num_hidden_layers=12, hidden_act="gelu",
    )  # fmt: skip
    CLIPVisionModel(config).save_pretrained(tmp_path / "theirs")
    alone = build_vision_encoder(NAME, str(tmp_path / "theirs")).visual.state_dict()
    own = Path(forms / "as_bin/open_clip_config.json")
    shutil.copy(own, tmp_path / "theirs")
    both = build_vision_encoder(NAME, str(tmp_path / "theirs")).visual.state_dict()
    assert alone.keys() == both.keys() and all(torch.equal(alone[key], both[key]) for key in alone)
    (tmp_path / "theirs/open_clip_config.json").unlink()
    shutil.copy(forms / "clip.bin", tmp_path / "theirs" / BIN)
    assert_same(build_vision_encoder(NAME, str(tmp_path / "theirs")), clip_state)


def test_pixels_of_a_whole_processor_are_read(tmp_path):
    """transformers 5 writes processor_config.json alone."""
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "processor_config.json"
    said: dict[str, object] = {"image_mean": [0.3] * 3, "image_std": [0.6] * 3}
    file.write_text(json.dumps({"image_processor": said}))
    found = resolve_vision_config(NAME, str(tmp_path))
    assert (found.mean, found.std) == ((0.3,) * 3, (0.6,) * 3)
    file.write_text(json.dumps({"image_processor": {**said, "do_normalize": False}}))
    with pytest.raises(UserError, match="processor_config.json: do_normalize is False"):
        resolve_vision_config(NAME, str(tmp_path))


def test_preprocess_cfg_that_is_no_mapping_is_named(forms, tmp_path):
    folder = Path(shutil.copytree(forms / "as_bin", tmp_path / "own"))
    edit_json(folder / "open_clip_config.json", preprocess_cfg="square")
    with pytest.raises(UserError, match="preprocess_cfg is 'square'"):
        build_vision_encoder(NAME, str(folder))


def without_a_block(state: dict[str, Tensor]) -> None:
    for name in [name for name in state if "resblocks.7." in name]:
        del state[name]


def of_another_width(state: dict[str, Tensor]) -> None:
    state["visual.conv1.weight"] = state["visual.conv1.weight"][:100]


def without_an_encoder(state: dict[str, Tensor]) -> None:
    for name in visual(state):
        del state[name]


def with_more(state: dict[str, Tensor]) -> None:
    state["visual.transformer.resblocks.12.ln_1.weight"] = torch.ones(384)


def twice(state: dict[str, Tensor]) -> None:
    state |= {f"ema.{name}": tensor for name, tensor in visual(state).items()}


def without_numbers(state: dict[str, Tensor]) -> None:
    state["visual.conv1.weight"] = state["visual.conv1.weight"].to("meta")


def with_a_number_for_a_name(state: dict) -> None:
    state[1] = torch.ones(1)


@pytest.mark.parametrize(
    "check", [build_vision_encoder, check_vision_weights], ids=["load", "check"]
)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_a_block, "resblocks.7.* is missing, and 11 more"),
        (of_another_width, r"visual.conv1.weight has shape \(100, 3, 32, 32\), needed is"),
        (without_an_encoder, "holds no vision encoder of open_clip"),
        (twice, r"several vision encoders \(ema.visual. and visual.\)"),
        (without_numbers, "visual.conv1.weight is sparse or has no numbers"),
        (with_a_number_for_a_name, "mapping from names to tensors"),
        (with_more, "resblocks.12.ln_1.weight belongs to nothing in this model"),
    ],
)
def test_weights_that_are_not_wholly_the_encoders_are_refused(
    change, said, check, clip_state, tmp_path
):
    state = dict(clip_state)
    change(state)
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(UserError, match=said):
        check(NAME, str(tmp_path / "clip.pt"))


def test_safetensors_are_known_under_any_name(forms, clip_state, tmp_path):
    for name in ("clip.pt", "clip"):
        shutil.copy(forms / "clip.safetensors", tmp_path / name)
        assert_same(build_vision_encoder(NAME, str(tmp_path / name)), clip_state)


@pytest.mark.parametrize("name", ["clip.safetensors", "clip.pt", "clip.bin"])
def test_torn_files_and_garbage_are_one_line(name, forms, tmp_path):
    file = tmp_path / name
    file.write_text("not any weights\n\n")
    with pytest.raises(UserError, match=name):
        build_vision_encoder(NAME, str(file))
    file.write_bytes(b"")
    with pytest.raises(UserError, match=name):
        build_vision_encoder(NAME, str(file))
    whole = (forms / ("clip.safetensors" if name.endswith("safetensors") else "clip.bin")).open(
        "rb"
    )
    file.write_bytes(whole.read(40_000_000))
    with pytest.raises(UserError, match=name):
        build_vision_encoder(NAME, str(file))


def test_a_torchscript_program_is_not_executed(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "ViT-S-32.pt")
    with pytest.raises(UserError, match="TorchScript program.*vision.weights=openai"):
        build_vision_encoder(NAME, str(tmp_path / "ViT-S-32.pt"))


def test_a_file_in_hugging_faces_layout_asks_for_its_folder(tmp_path):
    config = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_attention_heads=2)
    CLIPVisionModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="Hugging Face's layout: give its folder"):
        build_vision_encoder(NAME, str(tmp_path / "model.safetensors"))


def test_a_clip_folder_has_no_random_part(tmp_path):
    config = CLIPVisionConfig(
        hidden_size=384, intermediate_size=1536, num_attention_heads=6, patch_size=32,
        num_hidden_layers=12, hidden_act="gelu",
    )  # fmt: skip
    CLIPVisionModel(config).save_pretrained(tmp_path)
    sums = {
        hash_named_tensors(build_vision_encoder(NAME, str(tmp_path)).visual.state_dict().items())
        for _ in "ab"
    }
    assert len(sums) == 1
    pixels = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.2, 0.2]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    assert build_vision_encoder(NAME, str(tmp_path)).std == (0.2, 0.2, 0.2)


def test_a_config_is_written_as_open_clip_reads_it(tmp_path):
    for name in (NAME, "tiny_eva", SIGLIP):
        weights = "random" if name != "tiny_eva" else "embedded"
        config = resolve_encoder_config(name, weights, named_encoder_folder(name))
        config.save(tmp_path)
        assert read_vision_config(tmp_path) == config


FIT = ["fit", "recipe=yivl_llava", "stages.align_224.image_size=64"]
FIT += ["stages.align_448.image_size=96", "stages.chat.image_size=96", "log.questions=2"]
FIT += [f"stages.{stage}.train.vision=null" for stage in ("align_224", "align_448", "chat")]
FIT += [f"stages.{stage}.steps=1" for stage in ("align_224", "align_448", "chat")]
FIT += [f"stages.{stage}.global_batch_size=2" for stage in ("align_224", "align_448", "chat")]
FIT += ["log.tensorboard=false", "log.examples=0"]
VISION_NAME = f"vision.name={NAME}"


def test_a_frozen_encoder_is_the_files_before_and_after_everything(
    forms, clip_state, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    file = Path(shutil.copy(forms / "clip.safetensors", tmp_path / "clip.safetensors"))
    assert main([*FIT, VISION_NAME, f"vision.weights={file}", "only=align_224", "run=first"]) == 0
    told = capsys.readouterr().out
    expected = build_vision_encoder(NAME, str(file))
    total = hash_named_tensors(expected.visual.state_dict().items())
    assert f"vision {file} sha {total[:12]}" in told and "connector random (seed 0) sha " in told
    said = json.loads(Path("first/versions.json").read_text())["weights"]
    assert said["vision"] == {"source": str(file), "sha256": total}
    assert not any("vision." in name for name in load_file(weights_in("first")))
    expected.set_image_size(64)
    state = {f"visual.{k}": v for k, v in expected.visual.state_dict().items()}
    assert_same(vlbench.load("first").vision, state)
    # the next stages, from there
    assert main([*FIT, "from=align_448", "init=first", "run=all"]) == 0
    expected = build_vision_encoder(NAME, str(file))
    for side in (64, 96):
        expected.set_image_size(side)
    state = {f"visual.{k}": v for k, v in expected.visual.state_dict().items()}
    assert_same(vlbench.load("all").vision, state)
    assert main(["export", "model=all", "out=exported", "format=vlbench"]) == 0
    assert_same(vlbench.load("exported").vision, state)
    # another file under the same name is not what was trained with
    torch.manual_seed(9)
    save_file(dict(open_clip.create_model(NAME).state_dict()), file)
    capsys.readouterr()
    with pytest.raises(UserError, match="not the weights that .* began with"):
        vlbench.load("first")
    Path("first/results.json").unlink()
    assert main([*FIT, VISION_NAME, f"vision.weights={file}", "only=align_224", "run=first"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "not the weights" in lines[0]
    # what holds its encoder does not ask for the file
    file.unlink()
    assert_same(vlbench.load("all").vision, state)


def test_a_frozen_encoder_goes_through_the_sizes_of_its_run_again(forms, tmp_path, monkeypatch):
    """Position embeddings that are resized twice are other ones than those resized at once."""
    monkeypatch.chdir(tmp_path)
    file = str(forms / "clip.safetensors")
    assert main([*FIT, VISION_NAME, f"vision.weights={file}", "run=run"]) == 0
    expected = build_vision_encoder(NAME, file)
    at_once = build_vision_encoder(NAME, file)
    at_once.set_image_size(96)
    for side in (64, 96):
        expected.set_image_size(side)
    state = {f"visual.{k}": v for k, v in expected.visual.state_dict().items()}
    assert not torch.equal(
        at_once.visual.positional_embedding, expected.visual.positional_embedding
    )
    for folder in ("run", *Path("run/checkpoints").glob("[12]-*")):
        assert_same(vlbench.load(folder).vision, state)


def weights_in(run: str) -> Path:
    return next(Path(run, "checkpoints").glob("*/model.safetensors"))


def test_a_name_too_long_for_a_file_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*FIT, VISION_NAME, f"vision.weights={'x' * 300}", "run=run"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "too long" in lines[0] and not Path("run").exists()


@pytest.mark.parametrize("text", ["17 bytes of text\n", ""])
def test_garbage_is_one_line_before_there_is_a_run(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("clip.pt").write_text(text)
    assert main([*FIT, VISION_NAME, "vision.weights=clip.pt", "run=run"]) == 2
    assert not Path("run").exists()
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_trained_encoder_keeps_its_configuration(forms, tmp_path, monkeypatch):
    """What the weights decided, here pixels, is known again where the weights are gone."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(forms / "as_safetensors", "own")
    edit_json(
        Path("own/open_clip_config.json"), preprocess_cfg={"mean": [0.3] * 3, "std": [0.6] * 3}
    )
    words = [VISION_NAME, "vision.weights=own", "only=align_224", "run=run"]
    others = [word for word in FIT if word != "stages.align_224.train.vision=null"]
    assert main([*others, *words]) == 0
    shutil.rmtree("own")
    assert vlbench.load("run").processor.transform.mean == (0.3,) * 3


def test_a_checkpoint_without_a_part_is_not_completed_by_chance(model, tmp_path):
    """A connector that its file lacks would otherwise stay random, without a word."""
    folder = Path(shutil.copytree(model, tmp_path / "torn"))
    state = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("connector.")}
    assert 0 < len(kept) < len(state)
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(UserError, match="no weights of part connector"):
        vlbench.load(folder)
