"""Folders of quantized weights are refused in one line before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from golden_release import ENCODER_FOLDER, copy_checkpoint, edit_json

import vlbench
from vlbench.__main__ import main
from vlbench.errors import UserError
from vlbench.model.language_model import TINY_LANGUAGE_FOLDER, read_language_config

MMMU = Path(__file__).parent / "goldens/evaluation/mmmu_tiny"
KINDS = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq, 4 bits"),
    "awq": ({"quant_method": "awq", "bits": 4, "zero_point": True}, "awq, 4 bits"),
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False},
        "bitsandbytes, 4 bits",
    ),
    "eight bits": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bits"),
    "fp8": ({"quant_method": "fbgemm_fp8"}, "quantized (fbgemm_fp8)"),
    "unnamed": ({"version": "x"}, "of an unknown kind"),
}


@pytest.mark.parametrize(("said", "message"), KINDS.values(), ids=KINDS)
def test_a_release_is_refused_by_every_verb(said, message, tmp_path, capsys):
    folder = copy_checkpoint(tmp_path / "model")
    edit_json(folder / "config.json", quantization_config=said)
    for file in folder.glob("*.safetensors"):
        file.write_bytes(b"never read")
    for words in (
        ["chat", f"model={folder}", "question=Hello"],
        ["eval", f"model={folder}", "task=mmmu", f"data={MMMU}", f"out={tmp_path / 'out'}"],
        ["export", f"model={folder}", f"out={tmp_path / 'to'}", "format=vlbench"],
        ["fit", "recipe=yivl_llava", f"init={folder}", f"run={tmp_path / 'run'}"],
    ):
        assert main(words) == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1 and message in error[0]
        assert "config.json: the weights are quantized" in error[0]
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="the weights are quantized"):
        vlbench.load(folder)


@pytest.mark.parametrize(
    ("name", "method"), [("quantize_config.json", "gptq"), ("quant_config.json", "awq")]
)
def test_files_beside_the_configuration_say_it_too(name, method, tmp_path):
    folder = copy_checkpoint(tmp_path / "model")
    (folder / name).write_text(json.dumps({"bits": 4, "w_bit": 4}))
    with pytest.raises(UserError, match=rf"{name}: the weights are quantized \({method}, 4 bits\)"):
        vlbench.load(folder)


@pytest.mark.parametrize("part", [None, "text_config"])
def test_transformers_llava_says_it_outside_or_inside(part, tmp_path):
    said = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    config = {"model_type": "llava", "text_config": {}} | ({part: said} if part else said)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="awq, 4 bits"):
        vlbench.load(tmp_path)


def test_language_weights_and_encoders_are_refused_too(tmp_path):
    said = {"quant_method": "gptq", "bits": 8}
    (tmp_path / "language").mkdir()
    config = json.loads((TINY_LANGUAGE_FOLDER / "config.json").read_text())
    (tmp_path / "language/config.json").write_text(
        json.dumps(config | {"quantization_config": said})
    )
    with pytest.raises(UserError, match="gptq, 8 bits"):
        read_language_config(tmp_path / "language")
    folder = copy_checkpoint(tmp_path / "model")
    edit_json(folder / ENCODER_FOLDER / "config.json", quantization_config=said)
    with pytest.raises(UserError, match="gptq, 8 bits"):
        vlbench.load(folder)


def test_null_says_nothing(tmp_path):
    folder = copy_checkpoint(tmp_path / "model")
    text = json.loads((folder / "config.json").read_text()) | {"quantization_config": None}
    (folder / "config.json").write_text(json.dumps(text))
    assert vlbench.load(folder).processor.template.name == "yi_vl"
