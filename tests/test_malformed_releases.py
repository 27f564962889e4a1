"""Values and files that no release should have: each is named in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from golden_release import CHECKPOINT, ENCODER_FOLDER, copy_checkpoint, edit_json

import vlbench
from vlbench.__main__ import main
from vlbench.errors import UserError

SHARD = "model-00003-of-00007.safetensors"


def config_change(where: str = ".", **changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / where / "config.json", **changes)


ODD = {
    "activation": (config_change(hidden_act="odd"), "config.json: hidden_act is 'odd'"),
    "kind of rotation": (
        config_change(rope_scaling={"type": "odd", "factor": 2}),
        "config.json: its rotary positions",
    ),
    "base of rotation": (config_change(rope_theta="x"), "config.json: its rotary positions"),
    "no heads": (config_change(num_key_value_heads=0), "config.json: num_key_value_heads is 0"),
    "no patch": (config_change(ENCODER_FOLDER, patch_size=0), "config.json: patch_size is 0"),
    "named resample": (
        lambda f: edit_json(f / ENCODER_FOLDER / "preprocessor_config.json", resample="bicubic"),
        "resample is 'bicubic'; known are 0",
    ),
    "mean": (
        lambda f: edit_json(f / ENCODER_FOLDER / "preprocessor_config.json", image_mean=0.5),
        "image_mean is 0.5; wanted are three",
    ),
    "deviation": (
        lambda f: edit_json(
            f / ENCODER_FOLDER / "preprocessor_config.json", image_std=[0.5, 0.5, 0]
        ),
        "image_std is .*0 is none",
    ),
    "empty index": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
        "index.json has no weight_map",
    ),
    "text for weights": (
        lambda f: (f / ENCODER_FOLDER / "pytorch_model.bin").write_text("hello world"),
        "pytorch_model.bin holds more than tensors, or is torn",
    ),
    "added token": (
        lambda f: (f / "added_tokens.json").write_text('{"<a>": "x"}'),
        "added_tokens.json: the id of an added token is 'x'",
    ),
    "end": (
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": 2.5}'),
        "generation_config.json: eos_token_id is 2.5",
    ),
    "not UTF-8": (lambda f: (f / "config.json").write_bytes(b'{"a": "\xe9"}'), "not UTF-8 text"),
}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
ODD |= {
    f"pointer for {name}": (
        lambda f, name=name: (f / name).write_text(POINTER),
        f"{Path(name).name}: is a Git-LFS pointer.*run git lfs pull",
    )
    for name in (
        f"{ENCODER_FOLDER}/pytorch_model.bin",
        SHARD,
        "tokenizer.model",
        "tokenizer_config.json",
    )
}


@pytest.mark.parametrize(("change", "words"), ODD.values(), ids=ODD)
def test_odd_values_and_files_are_named_too(change, words, tmp_path):
    folder = copy_checkpoint(tmp_path / "model")
    change(folder)
    with pytest.raises(UserError, match=words) as caught:
        vlbench.load(folder)
    assert len(str(caught.value).splitlines()) == 1


def test_a_mark_of_byte_order_is_no_part_of_a_file(tmp_path):
    folder = copy_checkpoint(tmp_path / "model")
    for name in (
        "config.json",
        "tokenizer_config.json",
        f"{ENCODER_FOLDER}/preprocessor_config.json",
    ):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    assert vlbench.load(folder).processor.template.name == "yi_vl"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"transform": [], "stage": 0.5}'])
@pytest.mark.parametrize("name", ["preprocess.json", "position.json"])
def test_a_broken_checkpoint_is_one_clear_line(name, text, tmp_path, capsys):
    words = [f"model={CHECKPOINT}", f"out={tmp_path / 'own'}", "format=vlbench"]
    assert main(["export", *words]) == 0
    (tmp_path / "own" / name).write_text(text)
    capsys.readouterr()
    words = [f"model={tmp_path / 'own'}", f"out={tmp_path / 'to'}", "format=vlbench"]
    assert main(["export", *words]) == 2
    said = capsys.readouterr().err
    assert f"{name}: is not" in said and len(said.splitlines()) == 1
    assert not (tmp_path / "to").exists()
