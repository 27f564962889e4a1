"""A run that begins with a released model, or with weights of its parts."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from golden_release import CHECKPOINT, copy_checkpoint, load_tensors

import vlbench
from vlbench.__main__ import main
from vlbench.compare.experiment import probe_run
from vlbench.config import recipe as recipes
from vlbench.connector import registry
from vlbench.model.vlm import connector_shapes
from vlbench.train.shape_checks import meta_encoder_and_config

FIT = [
    "fit",
    "recipe=yivl_llava",
    "only=chat",
    "stages.chat.image_size=56",
    "stages.chat.global_batch_size=4",
]
FIT += ["log.questions=4", "log.tensorboard=false", "log.examples=0"]
RECORD = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
MINE = """
from torch import nn
from vlbench.connector import Connector

class Mine(Connector):
    def __init__(self, shapes):
        super().__init__()
        self.tokens_per_image = 1
        self.proj = nn.Linear(shapes.vision_width, shapes.lm_width)

    def forward(self, features):
        return self.proj(features.mean(1, keepdim=True))
"""


def last(run: Path) -> Path:
    return max((run / "checkpoints").iterdir())


def test_what_was_released_is_where_training_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*FIT, f"init={CHECKPOINT}", "run=run", "stages.chat.steps=0"]) == 0
    said = capsys.readouterr().out
    assert "vision encoder of 4 blocks, 80 wide; language model of 3 layers" in said
    assert "left out of its files: vision_tower (" in said  # copies, which the reference ignores
    ask = [{"role": "user", "content": "Hello"}]
    ours, theirs = vlbench.load("run"), vlbench.load(CHECKPOINT)
    assert torch.equal(ours(ours.prepare(ask)).logits, theirs(theirs.prepare(ask)).logits)
    assert ours.processor.transform == theirs.processor.transform


def test_resumed_without_the_release_it_ends_as_uninterrupted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = copy_checkpoint(tmp_path / "source")
    words = [*FIT, f"init={source}", "trainer.keep_last_checkpoints=9", "stages.chat.steps=4"]
    words += ["trainer.checkpoint_every=0.0001"]
    assert main([*words, "run=run"]) == 0
    whole = load_tensors(last(Path("run")))
    shutil.rmtree(last(Path("run")))
    shutil.rmtree(last(Path("run")))
    Path("run/results.json").unlink()
    shutil.rmtree(source)
    assert main([*words, "run=run"]) == 0
    again = load_tensors(last(Path("run")))
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)


@pytest.mark.parametrize("origin", ["release", "run"])
def test_another_connector_starts_anew_on_the_trained_parts(origin, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    init = str(CHECKPOINT)
    if origin == "run":
        assert main([*FIT, f"init={CHECKPOINT}", "run=first", "stages.chat.steps=1"]) == 0
        init = "first"
    Path("connectors").mkdir()
    Path("connectors/mine.py").write_text(MINE)
    words = [f"init={init}", "connector.name=mine", "run=second", "stages.chat.steps=1"]
    assert main([*FIT, *words]) == 0
    assert "connector mine starts anew" in capsys.readouterr().out
    assert vlbench.load("second").connector.proj.weight.shape == (64, 80)


def test_a_projector_of_another_depth_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        main([*FIT, f"init={CHECKPOINT}", "connector.depth=3", "run=run", "stages.chat.steps=1"])
        == 2
    )
    assert (
        "say connector.depth=2 connector.norm=true connector.mlp_ratio=1.0"
        in capsys.readouterr().err
    )
    assert not Path("run").exists()


@pytest.mark.parametrize("template", ["chatml", "llava_v1"])
def test_another_template_trains_and_talks(template, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [f"init={CHECKPOINT}", f"language.template={template}", "run=run"]
    assert main([*FIT, *words, "stages.chat.steps=1"]) == 0
    prompt = vlbench.load("run").prompt([{"role": "user", "content": "Hello"}])
    assert prompt.endswith(
        {"chatml": "<|im_start|>assistant\n", "llava_v1": "ASSISTANT:"}[template]
    )
    stored = json.loads((last(Path("run")) / "preprocess.json").read_text())["template"]
    assert stored["stop"] == {"chatml": "<|im_end|>", "llava_v1": "<|endoftext|>"}[template]
    assert main(["chat", "model=run", "question=Hello", "max_new_tokens=4"]) == 0


def test_a_connector_takes_its_references_weights_from_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["recipe=yivl_flamingo", "connector.every=2", "connector.depth=1"]
    words = ["fit", *small, "only=chat", "stages.chat.global_batch_size=4", *FIT[5:]]
    assert main([*words, "run=first", "stages.chat.steps=1"]) == 0
    trained = vlbench.load("first").connector
    reference = {f"perceiver.{k}": v for k, v in trained.perceiver.state_dict().items()}
    for layer, block in trained.blocks.items():
        start = f"lang_encoder.model.layers.{layer}.gated_cross_attn_layer."
        reference |= {start + key: value for key, value in block.state_dict().items()}
    torch.save({"model_state_dict": reference}, "openflamingo.pt")
    words += ["init=openflamingo.pt", "stages.chat.steps=0"]
    assert main([*words, "run=second"]) == 0
    assert "weights of connector flamingo" in capsys.readouterr().out
    ours = vlbench.load("second").connector.state_dict()
    theirs = {k: v for k, v in trained.state_dict().items() if k != "image_embedding"}
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    assert main([*words, "run=third", "connector.latents=8"]) == 2
    assert "init=openflamingo.pt does not fit" in capsys.readouterr().err
    words = ["fit", "recipe=yivl_eva", "only=chat", "init=openflamingo.pt", "run=fourth"]
    assert main(words) == 2
    assert "takes no file of weights" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mm_projector.bin", "non_lora_trainables.bin"])
@pytest.mark.parametrize(
    "said", [["connector.norm=false"], ["connector.name=linear"]], ids=["LLaVA-1.5", "LLaVA v1"]
)
def test_llavas_projector_is_where_training_begins(said, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["fit", "recipe=yivl_llava", "only=chat", "stages.chat.steps=0", *FIT[5:]]
    recipe = recipes.load_recipe([*words[1:3], *said])
    encoder, config = meta_encoder_and_config(recipe.model)
    encoder.set_image_size(recipe.stages["chat"].image_size)
    made = registry.load_connector(recipe.connector["name"])(
        connector_shapes(encoder, config), **recipe.model.connector_options
    )
    single = "0." if "linear" in said[0] else ""
    start = (
        "model.mm_projector." if name.startswith("mm") else "base_model.model.model.mm_projector."
    )
    state = made.released_projector().state_dict()
    torch.save({start + k.removeprefix(single): v.half() for k, v in state.items()}, name)
    assert main([*words, *said, f"init={name}", "run=run"]) == 0
    assert f"init {name}: weights of connector" in capsys.readouterr().out
    found = vlbench.load("run").connector.released_projector().state_dict()
    assert all(torch.equal(found[key], tensor.half().float()) for key, tensor in state.items())
    assert main([*words, f"init={name}", "run=other"]) == 2
    refused = capsys.readouterr().err
    assert "connector.norm=false" in refused and len(refused.splitlines()) == 1
    assert not Path("other").exists()


@pytest.mark.parametrize("origin", ["release", "run"])
def test_how_the_origin_was_trained_is_inherited_unless_something_else_is_said(
    origin, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    words = ["connector.norm=false", "stages.chat.steps=0"]
    said = ["language.template=llava_v1", "vision.layer=-3"]
    assert main([*FIT, *words, *said, "run=first"]) == 0
    init = "init=first"
    if origin == "release":
        assert main(["export", "model=first", "out=released", "format=hf_llava"]) == 0
        init = "init=released"
    assert main([*FIT, *words, init, "run=second"]) == 0
    second = recipes.load_recipe_file("second/recipe.yaml")
    assert (second.language.template, second.vision.layer) == ("llava_v1", -3)
    vlm = vlbench.load("second")
    assert (vlm.processor.template.name, vlm.vision.layer) == ("llava_v1", -3)
    capsys.readouterr()
    assert main(["show", "recipe=yivl_llava", *words, init, "vision.layer=-1"]) == 0
    shown = capsys.readouterr().out
    assert "layer: -1" in shown and "template: llava_v1" in shown


@pytest.mark.parametrize("word", ["vision.name=ViT-B-32", "language.weights=random"])
def test_a_part_that_init_brings_cannot_be_chosen_as_well(word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*FIT, f"init={CHECKPOINT}", word, "vision.weights=random", "run=run"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and f"leave {word.partition('=')[0]} out" in "".join(said)
    assert not Path("run").exists()


def test_a_recipe_that_names_its_encoder_goes_on_from_its_own_run(tmp_path, monkeypatch, capsys):
    """As those that graft writes do, and the command in a model card."""
    monkeypatch.chdir(tmp_path)
    own = ["recipe=yivl_eva_tower", *FIT[2:]]
    assert main(["fit", *own, "stages.chat.steps=0", "run=first"]) == 0
    capsys.readouterr()
    for words in ([], ["vision.name=eva"], ["vision.name=tiny_eva", "language.weights=embedded"]):
        assert main(["show", *own, "init=first", *words]) == 0
        assert "name: tiny_eva" in capsys.readouterr().out
    for words in (["vision.name=tiny"], ["language.weights=random"]):
        assert main(["show", *own, "init=first", *words]) == 2
        assert "brings its own" in capsys.readouterr().err
    assert main(["show", "recipe=yivl_llava", "init=first"]) == 0


def test_what_compare_tries_beforehand_is_the_model_of_init(monkeypatch, capsys):
    tried = []
    monkeypatch.setattr(probe_run, "measure_stages", lambda *_: iter(()))
    monkeypatch.setattr(probe_run, "time_question", lambda vlm, _: tried.append(vlm) or 0.0)
    words = ["recipe=yivl_llava", *FIT[2:], "vision.layer=-2", f"init={CHECKPOINT}"]
    assert probe_run.run_probe(words) == 0, capsys.readouterr().err
    (vlm,) = tried
    assert (vlm.vision.feature_width, vlm.language.config.hidden_size) == (80, 64)
    assert vlm.processor.transform.crop == 56


def test_a_part_that_the_origin_never_trained_is_the_origins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frozen = ["vision.weights=random", "seed=3", "stages.chat.train.vision=null"]
    assert main([*FIT, *frozen, "run=first", "stages.chat.steps=1"]) == 0
    assert main([*FIT, "init=first", "run=second", "stages.chat.steps=0"]) == 0
    ours, theirs = (vlbench.load(run).vision.state_dict() for run in ("second", "first"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_connector_with_other_options_is_told_those_of_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*FIT, "connector.depth=3", "run=first", "stages.chat.steps=0"]) == 0
    assert main([*FIT, "init=first", "run=second", "stages.chat.steps=0"]) == 2
    said = capsys.readouterr().err
    assert "say connector.depth=3 (" in said and len(said.splitlines()) == 1
    assert not Path("second").exists()


@pytest.mark.parametrize("origin", ["release", "run"])
def test_the_command_of_a_model_card_trains_on(origin, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["connector.depth=3", "connector.norm=false", "run=run", "stages.chat.steps=0"]
    if origin == "run":
        assert main([*FIT, *words]) == 0
    run = CHECKPOINT if origin == "release" else "run"
    assert main(["export", f"model={run}", "out=my model", "format=vlbench"]) == 0
    card = Path("my model/README.md").read_text(encoding="utf-8")
    (line,) = [line for line in card.splitlines() if "vlbench fit" in line]
    given = shlex.split(line.partition("vlbench fit ")[2])
    if origin == "release":
        Path("pictures").mkdir()
        Path("data.json").write_text(json.dumps([RECORD]))
        given = [word.replace("FILE.json", "data.json") for word in given]
        given = [word.replace("FOLDER", "pictures") for word in given]
        given += ["precision=32", "activation_checkpointing=none", "data.workers=0"]
    given += ["run=again", "stages.chat.steps=0", "stages.chat.image_size=56", *FIT[4:]]
    assert main(["fit", *given]) == 0
    ours, theirs = (vlbench.load(path).connector.state_dict() for path in ("again", run))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
