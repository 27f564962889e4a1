"""LoRA: what is trained, what a checkpoint holds, and what plain peft makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from random_vlm import make_batch, make_sample, small_vlm
from torch import Tensor
from transformers import LlamaForCausalLM

import vlbench
from vlbench.__main__ import main
from vlbench.connector import registry
from vlbench.model import lora_adapters
from vlbench.model.weights.tensor_files import read_tensors

DEFAULTS = {"rank": 3, "alpha": 6.0, "dropout": 0.0, "targets": "all-linear"}
DEFAULTS |= {"rslora": False, "dora": False, "bits": None}
SHORT = [f"stages.{name}.global_batch_size=3" for name in ("align_224", "align_448", "chat")]
SHORT += ["stages.align_224.steps=1", "stages.align_448.steps=1", "stages.chat.steps=4"]
SHORT += ["log.questions=2", "log.tensorboard=false", "log.examples=0"]
LORA = ["stages.chat.train.language.lora.rank=4", "stages.chat.train.language.lr=2e-3"]


def adapted(part: str, **options: object):
    """Return a small model whose part has adapters that are not zero."""
    vlm = small_vlm(registry.load_connector("llava_mlp")).to(torch.float64)
    torch.manual_seed(0)
    lora_adapters.add_adapters(getattr(vlm, part), part, **{**DEFAULTS, **options})
    for name, parameter in lora_adapters.adapter_parameters(getattr(vlm, part)).items():
        if "magnitude" not in name:
            parameter.data.normal_(std=0.1)
    return vlm


def loss(vlm) -> Tensor:
    batch = make_batch(vlm, [[make_sample(1), make_sample(2, images=2)]])
    return vlm(batch.to("cpu", torch.float64)).loss_sum


@pytest.mark.parametrize("part", ["language", "vision"])
@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}])
def test_every_adapter_learns_and_the_weights_stay(part, options):
    plain = small_vlm(registry.load_connector("llava_mlp")).to(torch.float64)
    before = {name: value.clone() for name, value in getattr(plain, part).state_dict().items()}
    vlm = adapted(part, **options)
    vlm.model.requires_grad_(False)
    used = {id(p) for p in vlm.vision.used_parameters()}
    for parameter in lora_adapters.adapter_parameters(getattr(vlm, part)).values():
        parameter.requires_grad_(part == "language" or id(parameter) in used)
    loss(vlm).backward()
    trained = [p for p in getattr(vlm, part).parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.any() for p in trained)
    after = lora_adapters.base_state_dict(getattr(vlm, part))
    assert after.keys() == before.keys()
    assert all(after[name].equal(value) for name, value in before.items())


@pytest.mark.parametrize("part", ["language", "vision"])
def test_merged_weights_give_the_same_without_adapters(part):
    vlm = adapted(part)
    names = set(getattr(small_vlm(registry.load_connector("llava_mlp")), part).state_dict())
    with torch.no_grad():
        before = loss(vlm)
        lora_adapters.merge_adapters(getattr(vlm, part))
        assert set(getattr(vlm, part).state_dict()) == names
        torch.testing.assert_close(loss(vlm), before)
    assert not lora_adapters.adapter_parameters(getattr(vlm, part))


def test_the_same_adapters_stay_and_others_replace_them():
    vlm = adapted("language")
    with torch.no_grad():
        before = loss(vlm)
        lora_adapters.add_adapters(vlm.language, "language", **DEFAULTS)
        assert loss(vlm).equal(before)
        lora_adapters.add_adapters(vlm.language, "language", **DEFAULTS | {"rank": 5})
        torch.testing.assert_close(loss(vlm), before)  # merged; new ones begin at nothing
    assert {
        p.shape[0]
        for n, p in lora_adapters.adapter_parameters(vlm.language).items()
        if "lora_A" in n
    } == {5}


def test_adapters_of_a_frozen_language_model_drop_nothing():
    """As in a stage that trains the connector alone, behind one that trained adapters."""
    vlm = adapted("language", dropout=0.5)
    vlm.model.language.requires_grad_(False)
    vlm.train()
    assert loss(vlm).equal(loss(vlm))
    vlm.eval()
    inactive = loss(vlm)
    vlm.train()
    torch.testing.assert_close(loss(vlm), inactive)
    assert vlm.language.training  # or checkpointing would be off
    for parameter in lora_adapters.adapter_parameters(vlm.language).values():
        parameter.requires_grad_(True)
    vlm.train()
    assert not loss(vlm).equal(loss(vlm))  # trained, they drop what the recipe says


@pytest.mark.parametrize("part", ["language", "vision"])
def test_adapters_come_back_from_their_folder(part, tmp_path):
    vlm = adapted(part)
    lora_adapters.save_adapters(getattr(vlm, part), tmp_path / "a")
    other = small_vlm(registry.load_connector("llava_mlp")).to(torch.float64)
    lora_adapters.load_adapters(getattr(other, part), tmp_path / "a")
    with torch.no_grad():
        torch.testing.assert_close(loss(other), loss(vlm), rtol=1e-6, atol=0)


def test_a_wrong_target_is_named():
    vlm = small_vlm(registry.load_connector("llava_mlp"))
    with pytest.raises(vlbench.errors.UserError, match="targets is 'q_prj'; known are all-linear"):
        lora_adapters.add_adapters(vlm.language, "language", **DEFAULTS | {"targets": "q_prj"})
    with pytest.raises(vlbench.errors.UserError, match="bits is 4, which needs a GPU"):
        lora_adapters.add_adapters(vlm.language, "language", **DEFAULTS | {"bits": 4})


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Train the chat stage of the miniatures with an adapter in the language model."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    assert main(["fit", "recipe=yivl_llava", f"run={folder}", *SHORT, *LORA]) == 0
    return folder


def newest(run: Path) -> Path:
    found = [one for one in (run / "checkpoints").iterdir() if not one.name.startswith(".")]
    return max(found, key=lambda one: one.name)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Compare logits by their largest: float32 has seven digits, whatever is added first."""
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def asked(vlm):
    words = [{"role": "user", "content": "How many objects are there?"}]
    return vlm.prepare(words)


def test_a_checkpoint_holds_the_adapter_and_not_the_language_model(run):
    names = {name.partition(".")[0] for name, _ in read_tensors(newest(run) / "model.safetensors")}
    assert names == {"vision", "connector"}
    assert (newest(run) / "adapters/language/adapter_config.json").is_file()
    vlm = vlbench.load(run)
    adapters = lora_adapters.adapter_parameters(vlm.language)
    assert adapters and all(p.any() for p in adapters.values())


def test_merged_and_unmerged_exports_give_the_same(run, tmp_path):
    vlm = vlbench.load(run)
    with torch.no_grad():
        expected = vlm(asked(vlm)).logits
        for layout, more in (("vlbench", ()), ("vlbench", ("merge_lora=true",))):
            to = tmp_path / f"{layout}{len(more)}"
            assert main(["export", f"model={run}", f"out={to}", f"format={layout}", *more]) == 0
            back = vlbench.load(to)
            assert bool(lora_adapters.adapter_parameters(back.language)) == (not more)
            assert_close(back(asked(back)).logits, expected)


def test_released_layouts_want_a_merge(run, tmp_path, capsys):
    words = ["export", f"model={run}", f"out={tmp_path / 'x'}", "format=hf_llava"]
    assert main(words) == 2
    assert "has LoRA adapters (language)" in capsys.readouterr().err
    assert main([*words, "merge_lora=yes"]) == 2
    assert "merge_lora must be true or false" in capsys.readouterr().err
    words = ["export", f"model={run}", f"out={tmp_path / 'y'}", "format=yi_vl"]
    assert main([*words, "merge_lora=true"]) == 0
    ours, back = vlbench.load(run), vlbench.load(tmp_path / "y")
    with torch.no_grad():
        assert_close(back(asked(back)).logits, ours(asked(ours)).logits)


@pytest.mark.parametrize(
    ("word", "said"),
    [("targets=foo", "targets is 'foo'; known are all-linear"), ("bits=4", "a GPU")],
)
def test_adapters_that_cannot_be_are_refused_before_the_first_stage(word, said, tmp_path, capsys):
    words = [f"stages.chat.train.language.lora.{word}", f"run={tmp_path / 'run'}"]
    assert main(["fit", "recipe=yivl_llava", *words]) == 2
    told = capsys.readouterr()
    assert said in told.err and "stages.chat.train.language.lora" in told.err
    assert "stage align_224" not in told.out and not (tmp_path / "run").exists()


def test_plain_peft_loads_the_adapter(run, tmp_path):
    from peft import PeftModel

    ours = vlbench.load(run)
    text = asked(ours).input_ids
    with torch.no_grad():
        expected = ours(asked(ours)).logits
    base = vlbench.load(run)
    lora_adapters.merge_adapters(
        base.language
    )  # takes the adapters away; the weights are read anew
    base.language.config._attn_implementation = "sdpa"
    plain = LlamaForCausalLM(base.language.config)
    state = lora_adapters.base_state_dict(ours.language)
    plain.load_state_dict(state)
    plain = PeftModel.from_pretrained(plain, newest(run) / "adapters/language").eval()
    with torch.no_grad():
        assert_close(plain(input_ids=text).logits, expected)


def test_a_stopped_run_with_adapters_goes_on_as_if_it_had_not(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["fit", "recipe=yivl_llava", *SHORT, *LORA, "trainer.checkpoint_every=0.001"]
    words += ["trainer.keep_last_checkpoints=9", "run=parts"]
    assert main(words) == 0
    for one in (tmp_path / "parts/checkpoints").glob("2-chat-00000[34]"):
        for file in sorted(one.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        one.rmdir()
    (tmp_path / "parts/results.json").unlink()
    assert main(words) == 0
    for name in ("model.safetensors", "adapters/language/adapter_model.safetensors"):
        assert (newest(run) / name).read_bytes() == (newest(tmp_path / "parts") / name).read_bytes()


def test_the_next_stage_trains_on_merged_weights(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [
        f"init={run}",
        "only=chat",
        "run=one",
        "stages.chat.global_batch_size=3",
        "stages.chat.steps=1",
    ]
    assert main(["fit", "recipe=yivl_llava", *words, *SHORT[-3:]]) == 0
    vlm = vlbench.load("one")
    assert not lora_adapters.adapter_parameters(vlm.language)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("stages.chat.train.connector.lora.rank=4", "a connector is trained whole"),
        (
            "stages.chat.train.vision.lora.bits=4",
            "train.vision.lora.bits=4; only train.language takes it",
        ),
        ("stages.chat.train.language.lora.bits=8", "lora.bits must be 4, given 8"),
        ("stages.chat.train.language.lora.rank=0", "must be at least 1"),
        ("stages.chat.train.language.lora.rnk=4", "Did you mean"),
        ("stages.chat.train.language.lora.targets=q_prj", "known are all-linear"),
    ],
)
def test_mistakes_are_one_line(word, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["only=chat", "stages.chat.steps=1", "log.questions=2", word]
    assert main(["fit", "recipe=yivl_llava", "run=r", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1
