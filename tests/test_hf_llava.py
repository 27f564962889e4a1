"""A folder for transformers' LLaVA answers in batches, and comes back as it went out."""

from __future__ import annotations

import filecmp
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_release import edit_json, load_tensors, make_plain_llava, rewrite_weights
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, LlavaForConditionalGeneration

import vlbench
from vlbench.__main__ import main
from vlbench.data.chat_template import CHAT_TEMPLATES
from vlbench.model.language_model import TINY_LANGUAGE_FOLDER, load_language_model

QUESTIONS = ("What?", "什么？", "How many circles are there, and of which colour is the largest?")
QUESTIONS += ("Describe it. " * 12, "a")


def export(run: Path, to: Path, *more: str) -> Path:
    assert main(["export", f"model={run}", f"out={to}", "format=hf_llava", *more]) == 0
    return to


def asked(number: int, text: str) -> list[dict[str, Any]]:
    """Return a conversation about a noisy image of its own, each of another shape."""
    noise = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 255, (40 + 9 * number, 60, 3), generator=noise, dtype=torch.uint8)
    parts = [{"type": "image", "image": Image.fromarray(pixels.numpy())}]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def answers(folder: Path, conversations: list[list[dict[str, Any]]], stop: str) -> list[list[int]]:
    """Return the ids that transformers answers to all conversations in one batch."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    prompts = [processor.apply_chat_template(one) for one in conversations]
    images = [one[0]["content"][0]["image"] for one in conversations]
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        new = model.generate(
            **inputs,
            max_new_tokens=16,
            do_sample=False,
            stop_strings=[stop],
            tokenizer=processor.tokenizer,
        )
    rest = new[:, inputs["input_ids"].shape[1] :]
    return [row[row != processor.tokenizer.pad_token_id].tolist() for row in rest]


def test_a_batch_is_answered_as_one_by_one(tmp_path):
    source = make_plain_llava(tmp_path / "source")
    to = export(source, tmp_path / "to")
    conversations = [asked(number, text) for number, text in enumerate(QUESTIONS)]
    vlm = vlbench.load(source, dtype="float32", device="cpu")
    together = answers(to, conversations, vlm.processor.template.stop)
    alone = [answers(to, [one], vlm.processor.template.stop)[0] for one in conversations]
    ours = [vlm.generate(vlm.prepare(one), max_new_tokens=16)[0] for one in conversations]
    assert together == alone == ours
    assert len({tuple(one) for one in ours}) == len(ours)  # five answers of their own


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_the_card_says_gives_the_models_pixels(mode, tmp_path, monkeypatch):
    """Transparency as well, which transformers alone would lay on white."""
    monkeypatch.chdir(tmp_path)
    source = make_plain_llava(tmp_path / "source")
    card = (export(source, tmp_path / "to") / "README.md").read_text()
    chat = asked(3, "What is it?")
    image = chat[0]["content"][0]["image"].convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    saved = (image.convert("RGB") if mode == "P" else image).convert(mode)
    saved.save("image.png", **({"transparency": saved.getpixel((9, 9))} if mode == "P" else {}))
    chat[0]["content"][0]["image"] = "image.png"
    vlm = vlbench.load(source, dtype="float32", device="cpu")
    said: dict[str, Any] = {}
    lines = [line[4:] for line in card.splitlines() if line.startswith("    ")]
    exec("\n".join(lines).replace("max_new_tokens=256", "max_new_tokens=4"), said)
    assert torch.equal(said["inputs"]["pixel_values"], vlm.prepare(chat).pixels)


def test_a_model_without_a_token_for_filling_gets_one(tmp_path):
    source = make_plain_llava(tmp_path / "source")
    edit_json(source / "tokenizer_config.json", pad_token=None, padding_side="right")
    to = export(source, tmp_path / "to")
    conversations = [asked(number, text) for number, text in enumerate(QUESTIONS[:2])]
    vlm = vlbench.load(to, dtype="float32", device="cpu")
    ours = [vlm.generate(vlm.prepare(one), max_new_tokens=16)[0] for one in conversations]
    assert answers(to, conversations, vlm.processor.template.stop) == ours


def same_files(one: Path, other: Path) -> None:
    names = {file.name for file in one.iterdir()}
    assert names == {file.name for file in other.iterdir()}
    apart = names - {"README.md", "model.safetensors"}
    assert filecmp.cmpfiles(one, other, apart, shallow=False)[1:] == ([], [])
    ours, theirs = load_tensors(one), load_tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


TEXTS = ("a<extra_0> b<extra_1>c", "<image> a <pad>", "What? 12 km\n\n 是<|im_end|>")


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (0, {}),
        (2, {}),
        (2, {"additional_special_tokens": ["<extra_0>"]}),
        (2, {"add_bos_token": True}),
        (0, {"added_tokens_decoder": {"7": {"content": "<|im_end|>"}}}),
        (0, {"additional_special_tokens": ["<|im_start|>"]}),
    ],
    ids=[
        *("no added tokens", "two", "one of them special", "and a begin"),
        *("an added piece", "a special piece"),
    ],
)
def test_an_export_comes_back_and_goes_out_again_the_same(tokens, said, tmp_path):
    source = make_plain_llava(tmp_path / "source", tokens=tokens)
    edit_json(source / "tokenizer_config.json", **said)
    once = export(source, tmp_path / "once")
    twice = export(once, tmp_path / "twice")
    same_files(once, twice)
    before, after = vlbench.load(source).tokenizer, vlbench.load(once).tokenizer
    theirs = AutoProcessor.from_pretrained(once, trust_remote_code=False).tokenizer
    for text in TEXTS:
        ids = before.encode(text)
        assert after.encode(text) == ids
        assert after.decode(ids) == before.decode(ids)
        plain = text.removesuffix("<|im_end|>")  # which transformers 5.17 does not always know
        assert text == TEXTS[1] or theirs(plain)["input_ids"] == before.encode(plain)
    assert (before.vocab_size, before.embedding_rows) == (after.vocab_size, after.embedding_rows)


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_the_template_comes_back(template, tmp_path):
    own = tmp_path / "own"
    source = make_plain_llava(tmp_path / "s")
    assert main(["export", f"model={source}", f"out={own}", "format=vlbench"]) == 0
    file = own / "recipe.yaml"
    file.write_text(file.read_text().replace("template: yi_vl", f"template: {template}"))
    once = export(own, tmp_path / "once")
    same_files(once, export(once, tmp_path / "twice"))
    assert vlbench.load(once).processor.template == vlbench.load(own).processor.template
    assert vlbench.load(once).processor.template.name == template


def test_tokens_that_the_model_never_learned_are_suppressed(tmp_path):
    """The tokenizer knows two tokens more than the model has embeddings, as Yi-6B-Chat's may."""
    source = make_plain_llava(tmp_path / "source")
    (source / "added_tokens.json").write_text('{"<a>": 1600, "<b>": 1601}')
    once = export(source, tmp_path / "once")
    assert json.loads((once / "config.json").read_text())["image_token_index"] == 1602
    said = json.loads((once / "generation_config.json").read_text())
    assert said["suppress_tokens"] == [1600, 1601, 1602]
    assert vlbench.load(once).tokenizer.embedding_rows == 1600
    same_files(once, export(once, tmp_path / "twice"))


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TIED = {
    "a head of its own": lambda state: state.update({HEAD: state[EMBEDDING].flip(0)}),
    "the same twice": lambda state: state.update({HEAD: state[EMBEDDING].clone()}),
    "no head": lambda state: state.pop(HEAD),
    "no embedding": lambda state: state.pop(EMBEDDING),
}


def their_logits(folder: Path, vlm: Any) -> torch.Tensor:
    """Return what transformers computes for a question without an image."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model(vlm.prepare(TEXT).input_ids).logits[0, :, :1600]


TEXT = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize("change", TIED.values(), ids=TIED)
@pytest.mark.parametrize("where", ["config", "text_config"])
@torch.no_grad()
def test_tied_embeddings_are_read_and_written_as_transformers_does(change, where, tmp_path):
    folder = export(make_plain_llava(tmp_path / "source"), tmp_path / "to")
    config = json.loads((folder / "config.json").read_text())
    (config if where == "config" else config["text_config"])["tie_word_embeddings"] = True
    config["text_config"]["vocab_size"] = 1600
    config["image_token_index"] = 1599  # no row more, so that both are as large
    (folder / "config.json").write_text(json.dumps(config))
    prefix = "language_model."

    def tie(state: dict) -> None:
        both = {name: state.pop(prefix + name)[:1600].clone() for name in (HEAD, EMBEDDING)}
        change(both)
        state |= {prefix + name: tensor for name, tensor in both.items()}

    rewrite_weights(folder, tie, "safetensors")
    vlm = vlbench.load(folder, dtype="float32", device="cpu")
    ours = vlm(vlm.prepare(TEXT)).logits[0, :, :1600]
    theirs = their_logits(folder, vlm)
    assert (ours - theirs).abs().max() <= 1e-3
    for layout in ("hf_llava", "vlbench", "yi_vl"):
        to = tmp_path / layout
        assert main(["export", f"model={folder}", f"out={to}", f"format={layout}"]) == 0
        back = vlbench.load(to, dtype="float32", device="cpu")
        assert torch.equal(back(back.prepare(TEXT)).logits[0, :, :1600], ours)
    again = their_logits(tmp_path / "hf_llava", vlm)
    assert (again - ours).abs().max() <= 1e-3


@pytest.mark.parametrize("change", TIED.values(), ids=TIED)
@torch.no_grad()
def test_a_plain_llama_is_tied_as_transformers_does(change, tmp_path):
    folder = Path(shutil.copytree(TINY_LANGUAGE_FOLDER, tmp_path / "llama"))
    edit_json(folder / "config.json", tie_word_embeddings=True)
    rewrite_weights(folder, lambda state: (change(state), None)[1], "safetensors")
    ours = load_language_model(folder, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    )
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name


def test_a_trained_head_of_its_own_survives_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = make_plain_llava(tmp_path / "source", tie_word_embeddings=True)
    words = ["recipe=yivl_llava", f"init={source}", "only=chat", "connector.norm=false", "run=run"]
    words += ["stages.chat.steps=0", "stages.chat.image_size=56", "stages.chat.global_batch_size=4"]
    words += ["log.questions=2", "log.tensorboard=false", "log.examples=0"]
    assert main(["fit", *words]) == 0
    head, embedding = (load_tensors(source)[name] for name in (HEAD, EMBEDDING))
    assert not torch.equal(head, embedding)
    run = vlbench.load("run").language
    assert torch.equal(run.lm_head.weight, head.float())
    assert torch.equal(run.model.embed_tokens.weight, embedding.float())
    for layout in ("yi_vl", "hf_llava"):
        assert main(["export", "model=run", f"out={layout}", f"format={layout}"]) == 0
        assert torch.equal(vlbench.load(layout).language.lm_head.weight[:1600], head.float())
    assert json.loads(Path("yi_vl/config.json").read_text())["tie_word_embeddings"] is False
