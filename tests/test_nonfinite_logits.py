"""A model whose logits are no numbers says so: no empty answer, no trace."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from golden_release import CHECKPOINT
from random_vlm import small_vlm
from safetensors.torch import load_file, save_file

from vlbench.__main__ import main
from vlbench.connector import registry
from vlbench.errors import EnvironmentFailure
from vlbench.model.generation.decoding_state import CompiledDecodeStep
from vlbench.model.generation.kv_cache import PrefixCache
from vlbench.model.generation.token_sampling import NONFINITE_ID, sample_next_ids
from vlbench.model.loaded_vlm import LoadedVLM

SAID = "^the model's logits are not finite: "
ASKED = [{"role": "user", "content": "What is this?"}]
WAYS = {
    "greedy": {},
    "drawn": {"temperature": 1.0, "top_p": 0.9},
    "compiled": {"compiled": True},
    "talk": {"past": PrefixCache()},
}


def build_small_vlm(value: float, name: str = "model.layers.1.mlp.up_proj.weight") -> LoadedVLM:
    vlm = small_vlm(registry.load_connector("llava_mlp")).eval()
    vlm.language.get_parameter(name).data[3, 2] = value
    vlm.decode_step = CompiledDecodeStep("eager")
    return vlm


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_weight_that_holds_no_number_is_named(way, value):
    vlm = build_small_vlm(value)
    line = f"{SAID}its weight language.model.layers.1.mlp.up_proj.weight holds nan or inf$"
    with pytest.raises(EnvironmentFailure, match=line):
        vlm.generate(vlm.prepare(ASKED), max_new_tokens=4, **way)


def test_numbers_that_became_too_large_are_told_from_broken_weights():
    vlm = build_small_vlm(1.0)
    vlm.language.lm_head.weight.data[7] = 3e38
    with pytest.raises(
        EnvironmentFailure, match=f"{SAID}all its weights are finite, so numbers became"
    ):
        vlm.chat(ASKED)
    vlm.language.lm_head.weight.data[7] = 6e4
    vlm.language.model.norm.weight.data.fill_(900.0)
    vlm.model.half()
    with pytest.raises(
        EnvironmentFailure, match=f"{SAID}all its weights are finite.* dtype=bf16 or dtype="
    ):
        vlm.chat(ASKED)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_other_rows_and_impossible_tokens_are_chosen_from_as_ever(temperature):
    nothing, never = float("nan"), float("-inf")
    logits = torch.tensor([[0.0, never, 9e9], [nothing, 0.0, 1.0], [0.0, float("inf"), 1.0]])
    drawn = torch.Generator().manual_seed(0)
    ids = sample_next_ids(logits, temperature, 1.0, drawn)
    assert ids.tolist() == [2, NONFINITE_ID, NONFINITE_ID]
    assert sample_next_ids(torch.full((1, 3), never), temperature, 1.0, drawn).tolist() == [
        NONFINITE_ID
    ]


@pytest.mark.parametrize("words", [[], ["temperature=1"]])
def test_chat_says_it_in_one_line(words, tmp_path: Path, capsys):
    shutil.copytree(CHECKPOINT, tmp_path / "model")
    for file in (tmp_path / "model").glob("*.safetensors"):
        state = load_file(file)
        save_file({k: v.fill_(float("nan")) if "norm" in k else v for k, v in state.items()}, file)
    assert main(["chat", f"model={tmp_path / 'model'}", "question=Hi", *words]) == 1
    no_image, line = capsys.readouterr().err.splitlines()
    assert no_image.startswith("vlbench: there is no image in this conversation")
    assert line.startswith("vlbench: the model's logits are not finite: its weight ")
