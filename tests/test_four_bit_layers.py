"""QLoRA without a GPU: a stand-in for bitsandbytes, and what is refused before training."""

from __future__ import annotations

import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from language_folders import write_language_folder
from random_vlm import CHECKPOINT, make_batch, make_sample
from torch import Tensor, nn

from vlbench.__main__ import main
from vlbench.config import recipe as recipes
from vlbench.connector import registry
from vlbench.contract_checks.small_model import build_small_vlm
from vlbench.errors import UserError
from vlbench.model import four_bit_layers, lora_adapters
from vlbench.model.language_model import load_language_model
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.train.trainable_parts import check_four_bit_stages

OPTIONS = {"rank": 3, "alpha": 6.0, "dropout": 0.0, "targets": "all-linear"}
OPTIONS |= {"rslora": False, "dora": False, "bits": 4}
PROJECTIONS = 7 * 3  # of three decoder layers


class RoundedWeights(nn.Parameter):
    """Weights rounded to 15 levels; bitsandbytes rounds them when they are moved to a GPU."""

    def __new__(cls, data: Tensor, requires_grad: bool, quant_type: str) -> RoundedWeights:
        assert quant_type == "nf4"
        step = data.abs().max() / 7
        return torch.Tensor._make_subclass(cls, (data / step).round() * step, requires_grad)


class RoundedLinear(nn.Linear):
    """A layer whose weights are `RoundedWeights`."""

    def __init__(
        self, inputs: int, outputs: int, bias: bool = True, device: Any = None, **options: Any
    ) -> None:
        super().__init__(inputs, outputs, bias, device)
        assert options == {"compute_dtype": torch.bfloat16, "quant_type": "nf4"}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `import bitsandbytes` give the stand-in, and a GPU be there."""
    from peft.import_utils import is_bnb_available

    is_bnb_available()  # peft keeps the answer, and would look for more in the stand-in
    module = ModuleType("bitsandbytes")
    module.__spec__ = importlib.machinery.ModuleSpec("bitsandbytes", None)
    module.nn = SimpleNamespace(Linear4bit=RoundedLinear, Params4bit=RoundedWeights)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model whose queries, keys and values have biases that are not zero."""
    return write_language_folder("qwen2", tmp_path_factory.mktemp("language") / "qwen2")


def open_vlm(folder: Path) -> LoadedVLM:
    language = load_language_model(folder, torch.float32)
    return build_small_vlm(registry.load_connector("linear"), {}, CHECKPOINT, language)


def quantized_layers(vlm: LoadedVLM) -> dict[str, nn.Module]:
    return {path: m for path, m in vlm.language.named_modules() if isinstance(m, RoundedLinear)}


def loss(vlm: LoadedVLM) -> Tensor:
    with torch.no_grad():
        found: Tensor = vlm.model(make_batch(vlm, [[make_sample(1)]])).loss_sum
    return found


def test_weights_are_rounded_and_biases_stay(qwen2, stand_in):
    vlm = open_vlm(qwen2)
    before = {name: value.clone() for name, value in vlm.language.state_dict().items()}
    lora_adapters.add_adapters(vlm.language, "language", **OPTIONS)
    after = lora_adapters.base_state_dict(vlm.language)
    assert after.keys() == before.keys() and len(quantized_layers(vlm)) == PROJECTIONS
    changed = {name for name, value in before.items() if not after[name].equal(value)}
    assert changed == {name for name in before if name.endswith("_proj.weight")}
    assert sum(name.endswith("_proj.bias") and bool(value.any()) for name, value in before.items())
    adapters = lora_adapters.adapter_parameters(vlm.language)
    assert len(adapters) == 2 * PROJECTIONS
    assert not any(isinstance(adapter, RoundedWeights) for adapter in adapters.values())


@pytest.mark.parametrize("dora", [False, True])
def test_a_run_that_goes_on_has_4_bits_under_the_adapters_that_it_loads(
    dora, qwen2, stand_in, tmp_path
):
    vlm, options = open_vlm(qwen2), {**OPTIONS, "dora": dora}
    lora_adapters.add_adapters(vlm.language, "language", **options)
    for parameter in lora_adapters.adapter_parameters(vlm.language).values():
        parameter.data += 0.1
    lora_adapters.save_adapters(vlm.language, tmp_path)
    resumed = open_vlm(qwen2)
    lora_adapters.load_adapters(resumed.language, tmp_path)
    without = loss(resumed)
    lora_adapters.add_adapters(resumed.language, "language", **options)
    assert quantized_layers(resumed).keys() == quantized_layers(vlm).keys()
    assert loss(resumed).equal(loss(vlm)) and not loss(vlm).equal(without)
    layers = quantized_layers(resumed)
    lora_adapters.add_adapters(resumed.language, "language", **options)  # of the next stage
    assert quantized_layers(resumed) == layers


ONE = ("only=chat", "stages.chat.train.language.lora.bits=4")
TWO = ("only=[align_448,chat]",)
ALIGNED = "stages.align_448.train.language.lr=1e-4"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*ONE, "language.weights=random"), "language.weights=random checkpoints hold the whole"),
        ((*ONE, "init=somewhere"), "init=somewhere checkpoints hold the whole language model"),
        ((*ONE, "trainer.strategy=fsdp2"), "cannot be sharded: trainer.strategy=ddp"),
        ((*TWO, ONE[1], ALIGNED), "stages.align_448.train.language is another"),
        (
            (*TWO, ALIGNED, "stages.align_448.train.language.lora.bits=4"),
            "stages.chat.train.language is another",
        ),
    ],
)
def test_weights_that_would_be_saved_merged_or_sharded_are_refused(words, said):
    recipe = recipes.load_recipe(["recipe=yivl_llava", *words])
    is_sharded = recipe.trainer.strategy == "fsdp2"
    with pytest.raises(UserError, match="lora.bits is 4") as raised:
        check_four_bit_stages(recipe.model, recipe.selected_stages, is_sharded)
    assert said in str(raised.value)


def test_the_same_adapters_in_two_stages_are_allowed():
    same = [
        f"stages.{name}.train.language.{word}"
        for name in ("align_448", "chat")
        for word in ("lr=1e-4", "lora.bits=4")
    ]
    for given in (ONE, (*TWO, ONE[1]), (*TWO, *same), TWO):
        recipe = recipes.load_recipe(["recipe=yivl_llava", *given])
        check_four_bit_stages(recipe.model, recipe.selected_stages, False)


def test_a_refusal_is_one_line_before_the_first_stage(tmp_path, capsys):
    words = [*ONE, "language.weights=random", f"run={tmp_path / 'run'}"]
    assert main(["fit", "recipe=yivl_llava", *words]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "cannot be saved in 4 bits" in said
    assert not (tmp_path / "run").exists()


def test_no_gpu_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="bits is 4, which needs a GPU and bitsandbytes"):
        four_bit_layers.check_quantization("train.language")
