"""`graft`: three parts that fit get a recipe that trains; three that do not get one line."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
from language_folders import write_language_folder
from own_templates import write_tokenizer

from vlbench.__main__ import main
from vlbench.config.recipe import load_recipe, to_plain
from vlbench.connector import registry
from vlbench.contract_checks.small_model import build_small_vlm
from vlbench.data.tokenizer import Tokenizer
from vlbench.encoder_names import vision_encoder_names
from vlbench.errors import UserError
from vlbench.graft import missing_files
from vlbench.graft.graft_options import parse_graft_options
from vlbench.graft.graft_recipe import fit_command, write_recipe
from vlbench.graft.part_table import parameter_lines
from vlbench.graft.sight_trial import LAST_STEPS, sight_lines, trial_recipe
from vlbench.graft.text_checks import choose_template, trip_conversations
from vlbench.model.language_model import TINY_LANGUAGE_FOLDER
from vlbench.model.named_encoder import named_encoder_folder, resolve_encoder_config
from vlbench.model.vision_config import resolve_vision_config
from vlbench.planner.gpu_table import local_gpu
from vlbench.planner.meta_model import build_meta_vlm
from vlbench.text_files import read_json

ROOT = Path(__file__).parents[1]
TINY = ["graft", "vision=tiny", "language=tiny", "connector=avgpool"]


def test_what_fits_gets_a_recipe_that_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, "out=recipes/mine.yaml", "connector.pool=4", "seed=7"]) == 0
    said = capsys.readouterr().out
    stages = ("align_224", "align_448", "chat")
    cells = [line.split() for line in said.splitlines()]
    assert ["chat", "112", "px", "8", "x", "8", "=", "64", "128", "wide", "4"] in [
        row[:11] for row in cells
    ]
    assert any(row[:2] == ["language", "tiny"] and "1,163,648" in row for row in cells)
    assert sum(line.endswith(" fits") for line in said.splitlines()) == 2
    assert "align_224 needs no more than align_448" in said
    trips = [row for row in cells if row[:1] in (["en"], ["zh"])]
    assert len(trips) == 2 and all(row[3:] == ["yes", "yes"] for row in trips)
    page = Path("recipes/mine.html").read_text(encoding="utf-8")
    assert 'class="learned"' in page and "data:image/jpeg" in page and "有" in page
    assert all(f"Stage {name}" in page for name in stages)
    assert "http" not in page and "<script" not in page
    (command,) = (line for line in said.splitlines() if line.startswith("python -m vlbench fit"))
    words = shlex.split(command)[3:]
    found = load_recipe(words[1:])
    assert (found.connector, found.seed) == ({"name": "avgpool", "pool": 4}, 7)
    assert main([*words, "dry_run=true", "only=chat"]) == 0


def test_two_encoders_and_several_blocks_are_told_apart():
    recipe = load_recipe(
        ["recipe=yivl_llava", "connector.name=dense", "vision.second.name=tiny_eva"]
    )
    vlm = build_meta_vlm(recipe.model, "chat", recipe.stages["chat"], recipe.precision)
    _, first, second, *_ = parameter_lines(recipe.model, recipe.selected_stages, vlm)
    assert first.startswith("vision ") and second.startswith("second_vision ")
    assert "tiny (an embedded" in first and "tiny_eva (an embedded" in second
    blocks = [str(block + 1) for block in vlm.vision.output_blocks]
    assert len(blocks) > 1 and f"features of blocks {', '.join(blocks)} of 5" in first
    odd = recipe.vision.model_copy(update={"name": "a + b"})  # as a folder may be called
    _, first, second, *_ = parameter_lines(
        replace(recipe.model, vision=odd), recipe.selected_stages, vlm
    )
    assert "a + b (an embedded" in first and "tiny_eva (an embedded" in second
    counts = {part: 1 for part, _ in vlm.model.named_parts()}
    local = missing_files.LocalLanguage(recipe.language, "")
    found = missing_files.file_lines(recipe.model, local, counts)
    assert [line.partition(":")[0] for line in found] == ["vision", "vision.second", "language"]


def test_nothing_is_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for taken in ("mine.yaml", "mine.html"):
        Path(taken).write_text("mine")
        assert main([*TINY, "out=mine.yaml"]) == 2
        said = capsys.readouterr().err
        assert said == f"vlbench: out=mine.yaml: {taken} is there already; name a new file\n"
        assert Path(taken).read_text() == "mine"
        Path(taken).unlink()
    Path("recipes").mkdir()
    Path("recipes/graft-1.yaml").write_text("mine")
    assert parse_graft_options(TINY[1:]).out == Path("recipes/graft-2.yaml")


@pytest.mark.parametrize(
    "words",
    [
        ["size=6b", "data.train=mine.json", "data.images=some folder", "language.weights=a/b"],
        ["recipe=yivl_blip2", "connector=qformer", "stages.chat.train.language.lora.rank=8"],
        ["recipe=yivl_eva_tower", "vision=eva", "activation_checkpointing=auto"],
        ["stages.chat.epochs=2", "trainer.devices=2", "vision.layer=-1", "log.questions=30"],
    ],
)
def test_the_written_recipe_is_the_one_that_was_checked(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {word.partition("=")[0] for word in words}
    given = [word for word in TINY[1:] if word.partition("=")[0] not in names]
    recipe = parse_graft_options([*given, *words]).recipe
    path = Path("my own/new.yaml")
    write_recipe(recipe, path)
    again = load_recipe(shlex.split(fit_command(path))[4:])
    differing = {"recipe": str(path), "size": "own"}
    assert to_plain(again) == to_plain(recipe) | differing


def test_a_name_brings_its_weights():
    def weights(vision: str, language: str) -> tuple[str, str]:
        words = [f"vision={vision}", f"language={language}", "connector=linear"]
        found = parse_graft_options(words).recipe
        return found.vision.weights, found.language.weights

    assert weights("tiny", "tiny") == ("embedded", "embedded")
    assert weights("ViT-H-14", "yi-34b") == ("laion2b_s32b_b79k", "01-ai/Yi-34B-Chat")
    assert weights("ViT-L-14-quickgelu", "some/model") == ("openai", "some/model")
    assert weights("EVA02-L-14-336", "yi-6b")[0] == "merged2b_s6b_b61k"


def test_a_names_own_weights_are_not_refused():
    """As OpenAI's are for ViT-L-14, which has GELU where theirs have QuickGELU."""
    for name in vision_encoder_names()[2:]:
        words = [f"vision={name}", "language=tiny", "connector=linear"]
        try:
            recipe = parse_graft_options(words).recipe
        except UserError as error:
            assert open_clip.list_pretrained_tags_by_model(name) == [] or re.search(
                f"say vision={name}-quickgelu", str(error)
            )
        else:
            assert resolve_vision_config(name, recipe.vision.weights)


def test_the_commands_of_the_pages_name_encoders_with_their_weights(tmp_path, monkeypatch):
    pages = [ROOT / "README.md", ROOT / "docs/howto/graft.md"]
    lines = [line for page in pages for line in page.read_text(encoding="utf-8").splitlines()]
    commands = [line for line in lines if line.startswith("    python -m vlbench graft vision=")]
    assert len(commands) == 3
    monkeypatch.chdir(tmp_path)
    for command in commands:
        vision = parse_graft_options(shlex.split(command)[4:]).recipe.vision
        assert resolve_encoder_config(
            vision.name, vision.weights, named_encoder_folder(vision.name)
        )


def qwen_folder(folder: Path, template: str | None = None) -> list[str]:
    """Write a small Qwen3 with its own tokenizer; return the words that graft it."""
    write_language_folder(
        "qwen3", folder, vocab_size=320, eos_token_id=256, max_position_embeddings=2048
    )
    (folder / "tokenizer.model").unlink()
    write_tokenizer(folder, "qwen 3", template)
    return [*TINY[:2], f"language={folder}", "connector=avgpool", "language.max_length=2000"]


@pytest.mark.parametrize("given", ["", "yi_vl"])
def test_a_tokenizers_own_template_is_taken_unless_another_is_named(
    given, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    words = qwen_folder(Path("qwen"))
    words += ["size=tiny", "out=mine.yaml"] + ([f"language.template={given}"] if given else [])
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"text: template {given or 'auto'}, answers end at" in said
    assert ("language.template=auto: the chat template that qwen brings" in said) != bool(given)
    assert load_recipe(["recipe=mine.yaml"]).language.template == (given or "auto")


def test_a_template_that_cannot_be_understood_is_told_and_left(tmp_path):
    write_tokenizer(tmp_path, "qwen 3", "{{ messages[0].content }}")
    name, note = choose_template("yi_vl", Tokenizer.load(tmp_path))
    assert name == "yi_vl" and note.startswith("language.template=yi_vl, as the chat template of")
    yi_vl = (
        "{% for m in messages %}### {{ 'Human' if m.role == 'user' else 'Assistant' }}: "
        "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}### Assistant:{% endif %}"
    )
    write_tokenizer(tmp_path, "qwen 3", yi_vl)
    assert choose_template("yi_vl", Tokenizer.load(tmp_path)) == ("yi_vl", "")
    assert choose_template("yi_vl", Tokenizer.load(TINY_LANGUAGE_FOLDER)) == ("yi_vl", "")


def test_a_language_model_by_yis_name_keeps_yi_vls_template():
    named = {
        language: parse_graft_options(
            ["vision=tiny", f"language={language}", "connector=linear"]
        ).names_template
        for language in ("yi-6b", "tiny", "some/model")
    }
    assert named == {"yi-6b": True, "tiny": True, "some/model": False}


def language_folder(folder: Path, **config: object) -> Path:
    """Return a copy of the embedded language model with other values in its config.json."""
    shutil.copytree(TINY_LANGUAGE_FOLDER, folder)
    known = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(known | config))
    return folder


def half_a_folder(folder: Path) -> None:
    """Leave one of the two shards that the index of a language model names."""
    language_folder(folder)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    weight_map = {
        "model.norm.weight": "model-1.safetensors",
        "lm_head.weight": "model-2.safetensors",
    }
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


NEEDY = """
from torch import nn
from vlbench.connector import Connector, Shapes

class Needy(Connector):
    class_token = True

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.layer = nn.Linear(shapes.vision_width, shapes.lm_width)

    def forward(self, features):
        return self.layer(features[:, :1])
"""


def broken_folders() -> None:
    """Write the folders that the wrong grafts name into the current one."""
    language_folder(Path("t5"), model_type="t5", is_encoder_decoder=True)
    language_folder(Path("moe"), model_type="mixtral", num_local_experts=8)
    language_folder(Path("wide"), hidden_size=256)
    language_folder(Path("quantized"), quantization_config={"quant_method": "gptq"})
    half_a_folder(Path("half"))
    for name in ("tokenizer.model", "tokenizer.json"):
        (language_folder(Path(f"no-{name}")) / name).unlink(missing_ok=True)
    Path("no-tokenizer.model").rename("silent")
    Path("empty").mkdir()
    Path("connectors").mkdir()
    Path("connectors/needy.py").write_text(NEEDY)


SIGLIP = ["vision=ViT-B-16-SigLIP", "vision.weights=random", "size=6b"]
WRONG_GRAFTS = {
    "no class token": ([*SIGLIP, "connector=needy"], "class token"),
    "a grid that does not divide": (["connector.pool=3"], "pool is 3, which must divide the grid"),
    "pixels that do not divide": (
        ["stages.chat.image_size=100"],
        "needs a multiple of 14, for example 98",
    ),
    "an encoder-decoder": (["language=t5"], "t5"),
    "a mixture of experts": (["language=moe"], "mixtral"),
    "a hybrid encoder": (["vision=MobileCLIP-S1"], "MobileCLIP-S1"),
    "a mistyped file": (
        [*SIGLIP[::2], "vision.weights=wieghts/clip.safetensors", "connector=llava_mlp"],
        "vision.weights is 'wieghts/clip.safetensors'; for ViT-B-16-SigLIP allowed are",
    ),
    "weights of another activation": (
        ["vision=ViT-L-14-336"],
        "trained with QuickGELU: say vision=ViT-L-14-336-quickgelu",
    ),
    "an unknown encoder": (["vision=ViT-L-141"], "Did you mean 'ViT-L-14'?"),
    "an unknown language model": (["language=yi-7b"], "Did you mean 'yi-6b'?"),
    "an unknown connector": (["connector=avgpol"], "Did you mean 'avgpool'?"),
    "an unknown option": (["connector.pol=2"], "Did you mean 'pool'?"),
    "half the files": (["language=half"], "names model-2.safetensors, which half does not have"),
    "weights of another model": (["language=wide"], "shape"),
    "quantized weights": (["language=quantized"], "the weights are quantized (gptq)"),
    "a tokenizer without a template": (["language.template=auto"], "no chat template of its own"),
    "no tokenizer": (["language=silent"], "there is no tokenizer file"),
    "no configuration": (["language=empty"], "a folder without config.json"),
    "a text longer than the model": (["language.max_length=9000"], "has 4096 positions"),
    "an image longer than the text": (
        ["connector=llava_mlp", "language.max_length=64"],
        "an image takes 64 tokens of the text",
    ),
    "heads that do not divide": (
        ["connector=resampler", "connector.heads=5"],
        "heads is 5, which must divide the language model's width 128",
    ),
    "a block that is not there": (["vision.layer=7"], "this vision encoder has 5 blocks"),
    "an unknown GPU": (["gpu=H20O"], "gpu is 'H20O'"),
    "an unknown key": (["conector=avgpool"], "Did you mean 'connector'?"),
    "no recipe": (["out=mine.txt"], "out=mine.txt must end in .yaml"),
    "a missing picture folder": (["data.train=no.json"], "no.json"),
}


@pytest.mark.parametrize(("words", "message"), WRONG_GRAFTS.values(), ids=WRONG_GRAFTS)
def test_what_does_not_fit_is_told_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    broken_folders()
    before = sorted(Path().rglob("*"))
    names = {word.partition("=")[0] for word in words}
    given = [word for word in TINY[1:] if word.partition("=")[0] not in names]
    given += [] if "size=6b" in words else ["size=tiny"]
    assert main(["graft", *given, *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and len(printed.err.splitlines()) == 1, printed.err
    assert sorted(Path().rglob("*")) == before


def test_a_tokenizer_that_loses_text_is_told():
    processor = build_small_vlm(registry.load_connector("linear")).processor
    assert not any(list(trip.cautions) for trip in trip_conversations(processor))
    tokenizer = processor.tokenizer

    class Forgetful:
        """A tokenizer without Chinese."""

        bos_token_id, unk_token_id = tokenizer.bos_token_id, tokenizer.unk_token_id
        decode, check_token_ids = tokenizer.decode, tokenizer.check_token_ids

        def encode(self, text: str, add_bos: bool = True) -> list[int]:
            parts = [tokenizer.encode(one) if one < "\x80" else [0] for one in text]
            return [token for part in parts for token in part]

    english, chinese = trip_conversations(replace(processor, tokenizer=Forgetful()))
    assert chinese.unknown_count > 10
    assert any("does not come back from the tokenizer" in line for line in chinese.cautions)
    assert any("tokens are unknown" in line for line in chinese.cautions)
    assert not english.lost_answers


def test_a_template_whose_end_is_not_learned_is_told():
    processor = build_small_vlm(registry.load_connector("linear")).processor
    template = replace(processor.template, answer_end="")
    for trip in trip_conversations(replace(processor, template=template)):
        assert not trip.learns_stop and "is not learned" in " ".join(trip.cautions)


def test_a_trial_is_short_and_about_scenes():
    recipe = load_recipe(
        ["recipe=yivl_llava", "size=6b", "data.train=mine.json", "data.val=v.json"]
    )
    short = trial_recipe(recipe)
    assert [stage.global_batch_size for stage in short.stages.values()] == [32, 32, 32]
    assert short.stages["chat"].steps == LAST_STEPS and short.stages["chat"].epochs is None
    assert (short.data.train, short.data.val) == ("scenes", None)
    few = load_recipe(["recipe=yivl_llava", "stages.chat.steps=5"])
    assert trial_recipe(few).stages["chat"].steps == 5


@pytest.mark.parametrize(("right", "words"), [(0.9, "it sees:"), (0.32, "does NOT show")])
def test_seeing_is_more_than_chance(right, words, tmp_path):
    shares = {"accuracy": right, "blank": 0.3, "shuffled": 0.3, "unseen": 0.5}
    lines = [
        {"set": name, "id": f"q{k}", "picture": f"p{k // 2}", "correct": k * 7 % 100 < 100 * share}
        for name, share in shares.items()
        for k in range(200)
    ]
    text = "".join(json.dumps(line | {"truth": "a", "answer": "b"}) + "\n" for line in lines)
    (tmp_path / "answers.jsonl").write_text(text)
    said = sight_lines(tmp_path)
    assert f"right {100 * right:.1f} %, blank 30.0 %, shuffled 30.0 %" in said[0]
    assert "200 questions" in said[0] and words in said[-1]
    assert all("95 % interval" in line for line in said[1:3]) and len(said) == 4


def test_the_gpu_of_this_machine_has_its_own_memory(monkeypatch):
    found = SimpleNamespace(name="NVIDIA H200", total_memory=150 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    assert local_gpu().memory_bytes == 150 * 10**9 and local_gpu().flops_per_second == 989e12
    found.name = "Some New One"
    assert local_gpu().name == "Some New One" and local_gpu().flops_per_second == 0


def test_weights_on_a_hub_are_what_is_missing(monkeypatch):
    recipe = load_recipe(["recipe=yivl_llava", "size=6b"])
    monkeypatch.setattr(missing_files, "_has_cached_weights", lambda *_: False)
    local = missing_files.LocalLanguage(recipe.language, "no network")
    vision, language = missing_files.file_lines(
        recipe.model, local, {"vision": 633_059_840, "language": 6_061_035_520}
    )
    assert "2.5 GB from laion/CLIP-ViT-H-14-laion2B-s32B-b79K" in vision
    assert "12.1 GB from 01-ai/Yi-6B-Chat" in language


@pytest.mark.slow
def test_real_sizes_are_answered_without_weights(tmp_path):
    words = ["graft", "vision=ViT-H-14", "language=yi-6b", "connector=qformer", "gpu=H200"]
    offline = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    # not in a fork: autograd of a process that has trained in another test refuses to run there
    done = subprocess.run(
        [sys.executable, "-m", "vlbench", *words],
        cwd=tmp_path,
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "6,061,035,520" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "recipes/graft-1.yaml").is_file()
