"""Which chat template a released model is asked with: told from its folder, said, or chosen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden_release import CHECKPOINT, ENCODER_FOLDER, copy_checkpoint, edit_json, rewrite_weights
from own_templates import CHATML, OWN_TEMPLATES, write_tokenizer

import vlbench
from vlbench.__main__ import main
from vlbench.config import recipe as recipes
from vlbench.data.own_template import bind_template
from vlbench.data.tokenizer import Tokenizer
from vlbench.errors import UserError
from vlbench.graft.text_checks import choose_template
from vlbench.model.weights.template_detection import match_jinja_template, read_jinja_template
from vlbench.train.resume import inherited_keys
from vlbench.train.run_report import describe_template

CLIP = "openai/clip-vit-large-patch14-336"
VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% else %}"
    "ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
LLAMA2 = "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"


def bare_projector(folder: Path) -> None:
    """Give a copy of the golden the projector of LLaVA-1.5: two layers without LayerNorms."""

    def bare(state: dict) -> None:
        for name in [name for name in state if "mm_projector" in name]:
            del state[name]
        for number, width in (("0", 80), ("2", 64)):
            state[f"model.mm_projector.{number}.weight"] = torch.randn(64, width) / 8
            state[f"model.mm_projector.{number}.bias"] = torch.randn(64) / 8

    edit_json(folder / "config.json", mm_projector_type="mlp2x_gelu")
    rewrite_weights(folder, bare)


PARTS = (  # of transformers' LLaVA-1.5: no system prompt, and nothing that ends an answer
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role.upper() + ': ' }}{% endif %}"
    "{% for part in m.content | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}"
    "{% endfor %}{% for part in m.content | selectattr('type', 'equalto', 'text') %}"
    "{{ part.text + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SOLAR = (  # Yi-VL's mark of an answer behind another mark of a question
    "{% for m in messages %}{{ '### ' + m.role.capitalize() + ':\n' + m.content + '\n\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
VICUNA_1_5 = "{{ 'A chat between a curious user and an AI. ' }}" + VICUNA


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    """A folder as LLaVA-1.5's own, with its encoder beside it."""
    folder = copy_checkpoint(tmp_path_factory.mktemp("llava") / "llava-v1.5")
    bare_projector(folder)
    (folder / ENCODER_FOLDER).rename(folder / "vit" / Path(CLIP).name)
    edit_json(folder / "config.json", mm_vision_tower=CLIP)
    return folder


@pytest.fixture(scope="module")
def hugging_face(llava, tmp_path_factory) -> Path:
    """The same in transformers' layout."""
    to = tmp_path_factory.mktemp("hf") / "to"
    assert main(["export", f"model={llava}", f"out={to}", "format=hf_llava"]) == 0
    return to


def said(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("jinja", "name"),
    [
        *((VICUNA, "llava_v1"), (PARTS, "llava_v1"), (CHATML, "chatml")),
        *((SOLAR, ""), (VICUNA_1_5, ""), (OWN_TEMPLATES["qwen 2.5"], "")),
        *((OWN_TEMPLATES["qwen 3"], ""), (OWN_TEMPLATES["smollm 3"], ""), ("{% for", "")),
    ],
)
def test_a_template_is_known_by_what_it_writes_and_not_by_a_mark_in_it(jinja, name):
    found, reason = match_jinja_template(jinja)
    assert found == name
    assert ("is like it" in reason) == bool(name)


def test_what_is_written_before_a_first_question_is_told():
    _, reason = match_jinja_template(OWN_TEMPLATES["qwen 2.5"])
    assert "none of yi_vl, chatml, llava_v1" in reason and "You are a helpful assistant" in reason


@pytest.mark.parametrize("given", ["chatml", "yi_vl"])
def test_a_tokenizer_with_a_system_prompt_of_its_own_brings_another_template(given, tmp_path):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, "qwen 2.5"))
    assert choose_template(given, tokenizer)[0] == "auto"
    told = describe_template(bind_template(given, tokenizer), tokenizer)
    assert "the tokenizer brings another one, which language.template=auto takes" in told


def test_yi_vls_template_is_not_taken_for_one_with_the_same_mark_of_an_answer(tmp_path):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, "solar", SOLAR))
    name, note = choose_template("yi_vl", tokenizer)
    assert name == "auto" or "cannot be used" in note


def test_of_several_templates_of_a_folder_the_default_is_read(tmp_path):
    several = [{"name": "tool_use", "template": SOLAR}, {"name": "default", "template": CHATML}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert read_jinja_template(tmp_path) == CHATML
    by_name = {one["name"]: one["template"] for one in several}
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": by_name}))
    assert read_jinja_template(tmp_path) == CHATML


def test_llavas_own_folder_is_asked_as_llava_and_it_is_said_in_one_line(llava, capsys):
    assert vlbench.load(llava).processor.template.name == "llava_v1"
    lines = said(capsys)
    assert len(lines) == 1 and "template llava_v1, as it is LLaVA and not Yi-VL" in lines[0]
    assert CLIP in lines[0] and "template= chooses another" in lines[0]


def test_what_is_chosen_is_taken_without_a_word(llava, capsys):
    assert vlbench.load(llava, template="yi_vl").processor.template.name == "yi_vl"
    assert vlbench.load(CHECKPOINT, template="chatml").processor.template.name == "chatml"
    assert said(capsys) == []


@pytest.mark.parametrize(
    ("changes", "template", "name", "lines"),
    [
        ({}, None, "yi_vl", 0),
        ({}, CHATML, "yi_vl", 1),  # of Yi-Chat's tokenizer
        ({"mm_projector_type": "mlp2x_gelu"}, VICUNA, "llava_v1", 1),
        ({"mm_projector_type": "mlp2x_gelu"}, CHATML, "chatml", 1),
        ({"mm_projector_type": "mlp2x_gelu"}, None, "yi_vl", 1),
        ({"mm_projector_type": "mlp2x_gelu", "conv_mode": "mm_default"}, CHATML, "yi_vl", 0),
        (
            {"mm_projector_type": "mlp2x_gelu", "_name_or_path": "liuhaotian/llava-v1.5-7b"},
            None,
            "llava_v1",
            1,
        ),
    ],
)
def test_a_folder_tells_its_template(changes, template, name, lines, tmp_path, capsys):
    folder = copy_checkpoint(tmp_path / "model")
    if changes:
        bare_projector(folder)
        edit_json(folder / "config.json", **changes)
    edit_json(folder / "tokenizer_config.json", chat_template=template)
    assert vlbench.load(folder).processor.template.name == name
    assert len(said(capsys)) == lines


def test_an_export_without_layernorms_is_asked_with_yis_template(model, tmp_path, capsys):
    words = [f"model={model}", "format=yi_vl"]
    assert main(["export", *words, f"out={tmp_path / 'norm'}"]) == 0
    assert "conv_mode" not in json.loads((tmp_path / "norm/config.json").read_text())
    words = [f"stages.{name}.steps=0" for name in ("align_224", "align_448", "chat")]
    words += ["connector.norm=false", "log.questions=1", "log.examples=0"]
    words += ["log.tensorboard=false", f"run={tmp_path / 'run'}"]
    assert main(["fit", "recipe=yivl_llava", *words]) == 0
    to = tmp_path / "bare"
    assert main(["export", f"model={tmp_path / 'run'}", f"out={to}", "format=yi_vl"]) == 0
    capsys.readouterr()
    assert vlbench.load(to).processor.template.name == "yi_vl" and said(capsys) == []


def test_transformers_folders_are_asked_with_what_their_own_template_is_like(
    hugging_face, tmp_path, capsys
):
    assert vlbench.load(hugging_face).processor.template.name == "llava_v1"
    assert "as its own chat template is like it" in said(capsys)[0]
    jinja = hugging_face / "chat_template.jinja"
    before = jinja.read_text()
    try:
        jinja.write_text(LLAMA2)
        with pytest.raises(UserError, match=r"none of yi_vl, chatml, llava_v1.*; say template="):
            vlbench.load(hugging_face)
        assert vlbench.load(hugging_face, template="chatml").processor.template.name == "chatml"
        recipe = recipes.load_recipe(["recipe=yivl_llava", f"init={hugging_face}"])
        with pytest.raises(UserError, match=r"say language.template="):
            inherited_keys(recipe.model, None)
        recipe = recipes.load_recipe(
            ["recipe=yivl_llava", f"init={hugging_face}", "language.template=chatml"]
        )
        assert "language" not in inherited_keys(recipe.model, None)
        jinja.unlink()
        assert vlbench.load(hugging_face).processor.template.name == "llava_v1"
        assert "has no chat template" in said(capsys)[-1]
    finally:
        jinja.write_text(before)


def test_a_run_begun_with_llava_has_its_template(llava, capsys):
    recipe = recipes.load_recipe(["recipe=yivl_llava", f"init={llava}"])
    assert inherited_keys(recipe.model, None)["language"] == {"template": "llava_v1"}
    assert "language.template= chooses another" in said(capsys)[0]


def test_chat_takes_a_template(monkeypatch, capsys):
    from test_chat_command import talk

    assert talk(["/history"], monkeypatch, "template=llava_v1") == 0
    assert "USER: ... ASSISTANT:" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["chat", "eval"])
def test_a_template_that_does_not_exist_is_refused_before_loading(verb, capsys):
    assert main([verb, "model=nowhere", "template=chatlm"]) == 2
    lines = said(capsys)
    assert len(lines) == 1
    assert "template must be one of auto, yi_vl, chatml, llava_v1, given 'chatlm'" in lines[0]
    assert "Did you mean 'chatml'?" in lines[0]
    with pytest.raises(UserError, match="Did you mean 'llava_v1'"):
        vlbench.load(CHECKPOINT, template="llava")


def test_eval_keeps_the_answers_of_templates_apart(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [f"model={model}", "task=own", "limit=2"]
    assert main(["eval", *words]) == 0
    assert main(["eval", *words, "template=llava_v1"]) == 0
    own, other = sorted(Path("evals", model.name).iterdir())
    assert (own.name, other.name) == ("own", "own-llava_v1")
    assert "template" not in json.loads((own / "settings.json").read_text())
    capsys.readouterr()
    assert main(["eval", *words, f"out={other}"]) == 2
    assert "differ in template (llava_v1 before, None now)" in said(capsys)[0]


@pytest.mark.parametrize("layout", ["hf_llava", "vlbench"])
def test_export_carries_the_template_that_is_chosen(layout, llava, tmp_path, capsys):
    words = [f"model={llava}", f"out={tmp_path / 'to'}", f"format={layout}", "template=chatml"]
    assert main(["export", *words]) == 0
    assert said(capsys) == []
    assert vlbench.load(tmp_path / "to").processor.template.name == "chatml"


def test_an_export_of_llava_with_yis_template_is_asked_with_it(llava, tmp_path, capsys):
    words = [f"model={llava}", f"out={tmp_path / 'to'}", "format=yi_vl", "template=yi_vl"]
    assert main(["export", *words]) == 0
    assert vlbench.load(tmp_path / "to").processor.template.name == "yi_vl" and said(capsys) == []
