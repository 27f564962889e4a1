"""What is written for others is what was trained, and what was read is given back bit by bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jinja2
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
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

import vlbench
from vlbench.__main__ import main
from vlbench.config.recipe import load_recipe
from vlbench.data.chat_template import CHAT_TEMPLATES
from vlbench.data.sample import IMAGE_PLACEHOLDER
from vlbench.model.weights.exported_template import IMAGE_TOKEN, to_jinja_template
from vlbench.processor import sample_from_messages
from vlbench.serve.model_card import _plain_markdown, describe_training
from vlbench.train.checkpoint_files import RunPosition

CASE = CASES["cases"][0]
SHORT = ["stages.align_224.steps=2", "stages.align_448.steps=2", "stages.chat.steps=3"]
SHORT += [f"stages.{name}.global_batch_size=4" for name in ("align_224", "align_448", "chat")]
SHORT += ["log.questions=4", "log.tensorboard=false", "log.examples=0"]


@torch.no_grad()
def logits(path: Path, asked: list | None = None, dtype: str | None = "float32") -> Tensor:
    vlm = vlbench.load(path, dtype=dtype, device="cpu")
    return vlm(vlm.prepare(asked or case_messages(CASE))).logits[0]


def export(run: Path, to: Path, layout: str, *more: str) -> int:
    return main(["export", f"model={run}", f"out={to}", f"format={layout}", *more])


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Train the miniatures for a few steps with connectors that transformers can and cannot say."""
    folder = tmp_path_factory.mktemp("runs")
    options = {"yi_vl": [], "mlp": ["connector.norm=false"]}
    options["linear"] = ["connector.norm=false", "connector.depth=1"]
    for name, words in options.items():
        run = [f"run={folder / name}", *words, *SHORT]
        assert main(["fit", "recipe=yivl_llava", *run]) == 0
    return {name: folder / name for name in options}


def image_messages() -> list[dict]:
    noise = torch.randint(0, 255, (60, 90, 3), generator=torch.manual_seed(0), dtype=torch.uint8)
    image = Image.fromarray(noise.numpy())
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "What? 是什么？"}]
    return [{"role": "user", "content": parts}]


def assert_same_tensors(one: Path, other: Path) -> None:
    ours, theirs = load_tensors(one), load_tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def stale(state: dict) -> None:
    for name in [name for name in state if "vision_tower" in name]:
        state[name] = torch.full_like(state[name], 7.0)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)


VARIANTS = {
    "golden": lambda folder: None,
    "bin shards, stale encoder, buffers": lambda folder: rewrite_weights(folder, stale),
    "float32 encoder": lambda folder: rewrite_weights(
        folder / ENCODER_FOLDER,
        lambda s: s.update({k: v.float() for k, v in s.items()}),
        "safetensors",
    ),
}


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS)
def test_importing_and_exporting_a_release_is_the_identity(change, tmp_path):
    source, to = copy_checkpoint(tmp_path / "source"), tmp_path / "to"
    change(source)
    assert export(source, to, "yi_vl") == 0
    assert_same_tensors(source, to)
    assert_same_tensors(source / ENCODER_FOLDER, to / ENCODER_FOLDER)
    for file in (*source.glob("*.json"), source / "tokenizer.model", *source.glob("vit/*/*.json")):
        if not file.name.endswith(".index.json"):
            assert (to / file.relative_to(source)).read_bytes() == file.read_bytes()
    assert (
        "1,600" not in (to / "README.md").read_text()
        and "released" in (to / "README.md").read_text()
    )


def test_a_release_survives_vlbenchs_own_format(tmp_path):
    assert export(CHECKPOINT, tmp_path / "own", "vlbench") == 0
    assert torch.equal(logits(tmp_path / "own"), logits(CHECKPOINT))
    assert export(tmp_path / "own", tmp_path / "back", "yi_vl") == 0
    for name in ("own", "back"):
        assert "Nothing was trained" in (tmp_path / name / "README.md").read_text()
    ours, theirs = load_tensors(tmp_path / "back"), load_tensors(CHECKPOINT)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert (tmp_path / "back/config.json").read_bytes() == (CHECKPOINT / "config.json").read_bytes()


@pytest.mark.parametrize("layout", ["yi_vl", "vlbench"])
def test_a_run_comes_back_from_every_layout_that_holds_it(layout, runs, tmp_path):
    assert export(runs["yi_vl"], tmp_path / "to", layout) == 0
    assert torch.equal(
        logits(tmp_path / "to", image_messages()), logits(runs["yi_vl"], image_messages())
    )
    card = (tmp_path / "to" / "README.md").read_text()
    assert "LlavaMLP, depth 2, norm True" in card and "| accuracy |" in card


def test_the_card_of_an_earlier_checkpoint_tells_what_was_trained_until_then(runs, tmp_path):
    run = runs["yi_vl"]
    assert export(run, tmp_path / "run", "vlbench") == 0
    assert "- chat: 3 steps" in (whole := (tmp_path / "run/README.md").read_text())
    assert export(tmp_path / "run", tmp_path / "again", "yi_vl") == 0
    assert (
        "- align_448: 2 steps" in whole
        and "- chat: 3 steps" in (tmp_path / "again/README.md").read_text()
    )
    (first,) = (run / "checkpoints").glob("0-align_224-*")
    assert export(first, tmp_path / "first", "yi_vl") == 0
    card = (tmp_path / "first/README.md").read_text()
    assert "- align_224: 2 steps" in card and "align_448" not in card and "chat:" not in card
    assert "| accuracy |" in whole and "accuracy" not in card


def test_a_card_tells_the_steps_of_a_stage_that_was_not_finished():
    recipe = load_recipe(["recipe=yivl_llava", "stages.align_224.epochs=2"])
    text = describe_training(
        recipe.recipe, recipe.model, recipe.stages, RunPosition(1, "align_448", 4)
    )
    assert "- align_224: 2.0 epochs" in text and "- align_448: 4 steps" in text
    assert "- chat" not in text


def test_photographs_that_are_turned_are_told_where_a_layout_does_not_turn_them(tmp_path, capsys):
    steps = [f"stages.{name}.steps=0" for name in ("align_224", "align_448", "chat")]
    words = ["data.exif=apply", f"run={tmp_path / 'run'}", "log.questions=1", "log.examples=0"]
    assert main(["fit", "recipe=yivl_llava", "log.tensorboard=false", *steps, *words]) == 0
    assert "an image is turned as its EXIF orientation says, padded" in capsys.readouterr().out
    for layout, is_lost in (("yi_vl", True), ("vlbench", False)):
        assert export(tmp_path / "run", tmp_path / layout, layout) == 0
        said = capsys.readouterr().err, (tmp_path / layout / "README.md").read_text()
        assert all(("PIL.ImageOps.exif_transpose" in text) is is_lost for text in said)


def test_a_type_can_be_chosen(runs, tmp_path):
    assert export(runs["yi_vl"], tmp_path / "to", "yi_vl", "dtype=bf16") == 0
    assert {t.dtype for t in load_tensors(tmp_path / "to").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "to/config.json").read_text())["torch_dtype"] == "bfloat16"
    for dtype in ("fp16", "float32"):
        to = tmp_path / dtype
        assert export(CHECKPOINT, to, "yi_vl", f"dtype={dtype}") == 0
        said = json.loads((to / ENCODER_FOLDER / "config.json").read_text())["torch_dtype"]
        assert said == {"fp16": "float16"}.get(dtype, dtype)


@pytest.mark.parametrize("name", ["mlp", "linear"])
@torch.no_grad()
def test_transformers_computes_the_same_logits(name, runs, tmp_path):
    to = tmp_path / "to"
    assert export(runs[name], to, "hf_llava") == 0
    model = LlavaForConditionalGeneration.from_pretrained(to, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(to, backend="pil", trust_remote_code=False)
    vlm = vlbench.load(runs[name])
    asked = image_messages()
    image = asked[0]["content"][0]["image"]
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True)
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    batch = vlm.prepare(asked)
    assert inputs["pixel_values"].equal(batch.pixels)
    ids = inputs["input_ids"][0]
    assert ids.where(ids != model.config.image_token_id, -200).equal(batch.input_ids[0])
    ours = vlm(batch).logits[0]
    theirs = model(**inputs).logits[0, :, : ours.shape[-1]]
    assert (ours - theirs).abs().max() <= 1e-3
    assert torch.equal(logits(to, asked)[:, : ours.shape[-1]], ours)  # and the way back
    stop = vlm.processor.template.stop
    new = model.generate(
        **inputs,
        max_new_tokens=12,
        do_sample=False,
        stop_strings=[stop],
        tokenizer=processor.tokenizer,
    )
    written = vlm.generate(batch, max_new_tokens=12)[0]
    assert new[0, len(ids) :].tolist()[: len(written)] == written


def test_what_a_layout_cannot_hold_is_refused_with_an_alternative(runs, tmp_path, capsys):
    to = tmp_path / "to"
    assert export(runs["yi_vl"], to, "hf_llava") == 2
    assert "LayerNorms" in (said := capsys.readouterr().err) and "format=yi_vl" in said
    assert export(CHECKPOINT, to, "gguf") == 2
    assert "format must be one of yi_vl" in capsys.readouterr().err
    assert export(CHECKPOINT, CHECKPOINT, "yi_vl") == 2
    assert "is there already" in capsys.readouterr().err
    assert export(CHECKPOINT, to, "yi_vl", "dtype=int4") == 2
    assert "dtype must be one of float32" in capsys.readouterr().err
    assert export(CHECKPOINT, Path("/proc/nowhere"), "yi_vl") == 2
    assert "out=/proc/nowhere cannot be written" in capsys.readouterr().err
    assert not to.exists() and not list(tmp_path.glob(".writing*"))


def test_a_template_that_the_authors_code_does_not_know_is_refused(tmp_path, capsys):
    assert export(CHECKPOINT, tmp_path / "own", "vlbench") == 0
    file = tmp_path / "own/recipe.yaml"
    file.write_text(file.read_text().replace("template: yi_vl", "template: chatml"))
    assert export(tmp_path / "own", tmp_path / "to", "yi_vl") == 2
    assert "language.template is chatml" in capsys.readouterr().err


CONVERSATIONS = {
    "one": [("user", "What?")],
    "several": [("user", "a "), ("assistant", " b "), ("user", "c")],
    "system": [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c")],
    "image": [("user", [("image", None), ("image", None), ("text", "Compare.")])],
    "image last": [("user", [("text", "See:"), ("image", None)])],
}


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_transformers_template_writes_what_ours_writes(name, conversation):
    template = CHAT_TEMPLATES[name].bind_eos("<|endoftext|>")
    asked = []
    for role, content in conversation:
        if not isinstance(content, str):
            blank = Image.new("RGB", (4, 4))
            content = [{"type": k, k: blank if k == "image" else v} for k, v in content]
        asked.append({"role": role, "content": content})
    ours = template.render_prompt(sample_from_messages(asked).turns).replace(
        IMAGE_PLACEHOLDER, IMAGE_TOKEN
    )
    assert jinja2.Template(to_jinja_template(template)).render(messages=asked) == ours


def test_a_trained_release_keeps_its_files_and_says_what_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = copy_checkpoint(tmp_path / "source")
    edit_json(source / "config.json", mm_vision_tower=f"/elsewhere/{ENCODER_FOLDER}")
    words = ["recipe=yivl_llava", f"init={source}", "only=chat", "run=run", "stages.chat.steps=2"]
    words += ["stages.chat.image_size=84", "stages.chat.global_batch_size=4", *SHORT[-3:]]
    assert main(["fit", *words]) == 0
    rename = tmp_path / "gone"
    source.rename(rename)  # a checkpoint stands alone
    assert export(Path("run"), Path("to"), "yi_vl") == 0
    config = json.loads(Path("to/config.json").read_text())
    before = json.loads((rename / "config.json").read_text())
    changed = {key for key in config if config[key] != before.get(key)}
    assert changed == {"mm_vision_tower", "torch_dtype"}
    assert config["mm_vision_tower"] == f"./{ENCODER_FOLDER}" and config["torch_dtype"] == "float32"
    processor = json.loads(Path("to", ENCODER_FOLDER, "preprocessor_config.json").read_text())
    assert processor["size"] == {"shortest_edge": 84}
    assert torch.equal(logits(Path("to"), image_messages()), logits(Path("run"), image_messages()))
    assert not torch.equal(logits(Path("to"), image_messages()), logits(rename, image_messages()))


def test_replace_keeps_a_template_bound():
    bound = CHAT_TEMPLATES["llava_v1"].bind_eos("</s>")
    assert bound.stop == bound.answer_end == "</s>"
    assert replace(bound, name="x").stop == "</s>"


def test_a_leading_bos_survives_transformers(tmp_path):
    source = copy_checkpoint(tmp_path / "source")
    edit_json(source / "tokenizer_config.json", add_bos_token=True)
    edit_json(source / "config.json", mm_projector_type="mlp2x_gelu")

    def bare(state: dict) -> None:
        for name in [name for name in state if "mm_projector" in name]:
            del state[name]
        for number, width in (("0", 80), ("2", 64)):
            state[f"model.mm_projector.{number}.weight"] = torch.randn(64, width)
            state[f"model.mm_projector.{number}.bias"] = torch.randn(64)

    rewrite_weights(source, bare)
    assert export(source, tmp_path / "to", "hf_llava") == 0
    ask = [{"role": "user", "content": "Hello"}]
    ours, back = (
        vlbench.load(path).prepare(ask).input_ids[0] for path in (source, tmp_path / "to")
    )
    theirs = AutoProcessor.from_pretrained(tmp_path / "to", trust_remote_code=False).tokenizer
    assert ours[0] == 1 and ours.equal(back)
    prompt = vlbench.load(source).prompt(ask)
    assert theirs(prompt)["input_ids"] == ours.tolist()
    named = json.loads((tmp_path / "to/tokenizer_config.json").read_text())
    named["added_tokens_decoder"] = {"6": {"content": "<|im_start|>"}}  # no sign of a template
    (tmp_path / "to/tokenizer_config.json").write_text(json.dumps(named))
    assert vlbench.load(tmp_path / "to").processor.template.name == "yi_vl"


@pytest.mark.parametrize("kept", [True, False], ids=["head in the files", "no head"])
@pytest.mark.parametrize("layout", ["yi_vl", "hf_llava", "vlbench"])
def test_tied_embeddings_come_back(layout, kept, tmp_path):
    source = copy_checkpoint(tmp_path / "source")
    said = {"tie_word_embeddings": True, "mm_projector_type": "linear", "vocab_size": 1664}
    edit_json(source / "config.json", **said)

    def tie(state: dict) -> None:
        for name in [name for name in state if "mm_projector" in name]:
            del state[name]
        state["model.mm_projector.weight"] = torch.randn(64, 80)
        state["model.mm_projector.bias"] = torch.randn(64)
        name = "model.embed_tokens.weight"
        state[name] = torch.cat([state[name], state[name][:64]])  # no row is added for <image>
        state["lm_head.weight"] = state[name].clone()
        if not kept:
            del state["lm_head.weight"]

    rewrite_weights(source, tie)
    assert export(source, tmp_path / "to", layout) == 0
    before, after = logits(source), logits(tmp_path / "to")
    assert before.shape == (len(before), 1664) and torch.equal(before, after)
    if layout == "yi_vl":
        assert_same_tensors(source, tmp_path / "to")


def test_sigterm_leaves_nothing_half_written(tmp_path):
    """The signal comes while the folder is being written, to a process of its own."""
    halt = (
        "import os, signal, sys\n"
        "from vlbench.serve import export_command\n"
        "export_command.write_yi_vl = lambda *a: os.kill(os.getpid(), signal.SIGTERM)\n"
        "from vlbench.__main__ import main\n"
        "sys.exit(main(['export', *sys.argv[1:]]))\n"
    )
    words = [f"model={CHECKPOINT}", f"out={tmp_path / 'to'}", "format=yi_vl"]
    done = subprocess.run([sys.executable, "-c", halt, *words], capture_output=True)
    assert done.returncode == -signal.SIGTERM and not done.stderr and not list(tmp_path.iterdir())
    (tmp_path / ".writing-to").mkdir()  # of a process that was killed
    (tmp_path / ".writing-to/rest").write_text("")
    assert main(["export", *words]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["to"]
    assert not (tmp_path / "to/rest").exists()


def test_nothing_in_a_model_card_acts_as_markup() -> None:
    assert _plain_markdown("a<script>|`[x](http://y)\n# b") == (
        "a\\<script>\\|'\\[x]\\(http://y)\\n# b"
    )
    recipe = load_recipe(["recipe=yivl_llava"]).model_copy(
        update={"recipe": "x`<b>.yaml", "init": "y <img src=z>\n# title"}
    )
    position = RunPosition(2, "chat", 7)
    text = describe_training(recipe.recipe, recipe.model, recipe.stages, position)
    assert "Recipe `x'\\<b>`," in text and "y \\<img src=z>\\n# title" in text
