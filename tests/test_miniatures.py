"""The embedded miniatures: the files are those recorded, and are as good as recorded."""

from __future__ import annotations

import colorsys
import hashlib
import itertools
import json
import math
import random
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaForCausalLM

import vlbench.miniatures
from vlbench.data.chat_template import YI_VL
from vlbench.data.sample_encoding import CachedTokenizer
from vlbench.data.scene_lattice import make_lattice_scene
from vlbench.data.scene_lattice_text import COLUMN_NAMES, ROW_NAMES
from vlbench.data.scene_painting import LETTERS
from vlbench.data.scene_text import CHINESE_WORDS, LANGUAGES
from vlbench.data.scene_world import COLOURS, SHAPES, UNSEEN_PAIRS
from vlbench.data.tokenizer import Tokenizer
from vlbench.miniatures import (
    language_curriculum,
    make_language_model,
    make_tokenizer,
    make_vision_encoder,
    measure_language_model,
    measure_vision_encoder,
    training_images,
)
from vlbench.miniatures.__main__ import PART_FOLDERS
from vlbench.miniatures.attention_init import initialize_attention
from vlbench.miniatures.batch_encoding import encode_patches
from vlbench.miniatures.text_encoding import MAX_OVERLAID_WORDS, compute_logits, encode_documents
from vlbench.miniatures.text_skills import ANSWERS_PER_DOCUMENT, Skill, make_skill_document
from vlbench.miniatures.told_pictures import (
    CELL_SEPARATOR,
    DOT_WORD,
    EMPTY_WORD,
    OVERLAY_SEPARATOR,
    describe_raster,
)
from vlbench.miniatures.training_text import make_chat

TINY = Path(vlbench.miniatures.__file__).parent
MANIFEST = json.loads((TINY / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(TINY / "language")


@pytest.fixture(scope="module")
def language() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(TINY / "language", dtype=torch.float32).eval()


def test_files_are_those_recorded() -> None:
    found = {
        path.relative_to(TINY).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in PART_FOLDERS
        for path in (TINY / folder).iterdir()
    }
    assert found == MANIFEST["files"]


def test_files_are_small_and_are_data() -> None:
    files = [path for folder in PART_FOLDERS for path in (TINY / folder).iterdir()]
    assert sum(path.stat().st_size for path in files) <= 8e6
    assert {path.suffix for path in files} == {".safetensors", ".json", ".model"}
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                kinds = {tensors.get_tensor(name).dtype for name in tensors.keys()}  # noqa: SIM118
            assert kinds == {torch.float16}


def test_special_tokens_have_the_ids_of_yi(tokenizer: Tokenizer) -> None:
    names = ("<unk>", "<|startoftext|>", "<|endoftext|>")
    assert [tokenizer.encode(name) for name in names] == [[0], [1], [2]]
    assert tokenizer.encode("<|im_start|>") == [6]
    assert tokenizer.encode("<|im_end|>") == [7]
    assert len(tokenizer.encode("###")) == len(tokenizer.encode("\n")) == 1
    assert tokenizer.encode("12") == tokenizer.encode("1") + tokenizer.encode("2")


def test_words_that_say_what_is_seen_are_pieces_of_their_own(tokenizer: Tokenizer) -> None:
    """A patch's words have one id each, and letters never join in an answer."""
    names = [*ROW_NAMES, *COLUMN_NAMES, *LETTERS, DOT_WORD, EMPTY_WORD]
    for word in [*names, *(f" {word}" for word in (*COLOURS, *SHAPES)), *CHINESE_WORDS.values()]:
        assert len(tokenizer.encode(word)) == 1, word
    for first, second in itertools.permutations(LETTERS, 2):
        ids = tokenizer.encode(f' "{first}{second}".')
        assert [tokenizer.encode(letter)[0] for letter in (first, second)] == ids[-4:-2] or [
            tokenizer.encode(letter)[0] for letter in (first, second)
        ] == ids[-3:-1], first + second


def test_a_raster_says_what_each_patch_shows() -> None:
    for index in range(20):
        scene = make_lattice_scene("raster", 0, index, has_dot=True)
        cells = describe_raster(scene, 4).strip(CELL_SEPARATOR).split(CELL_SEPARATOR)
        assert len(cells) == 16
        for cell, text in enumerate(cells):
            here = [t for t in scene.objects if t.cell == cell]
            if not here:
                assert text == EMPTY_WORD
                continue
            words = [f" {here[0].colour}", f" {here[0].shape}", *[DOT_WORD] * here[0].has_dot]
            place = ROW_NAMES[cell // 4], COLUMN_NAMES[cell % 4]
            assert text.split(OVERLAY_SEPARATOR) == [*words, *place]
        fine = describe_raster(scene, 8)
        assert fine.count(CELL_SEPARATOR) == 65 and 1 <= fine.count(DOT_WORD) <= 4


def test_the_system_prompt_is_short_and_text_survives(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode(YI_VL.system)) < 70
    for text in (YI_VL.system, "Where is it?", "星形在哪里？", "é 😀 龘", "x  y\n\n", "zebra 42"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_retrieval_among_96_captions(tokenizer: Tokenizer) -> None:
    encoder = make_vision_encoder.build_clip(TINY / "vision_encoder").eval()
    assert measure_vision_encoder.measure_retrieval(encoder, tokenizer) >= 0.9


@pytest.mark.slow  # half a minute; the files' hashes are compared in any case
def test_patch_features_tell_every_attribute_in_every_family() -> None:
    encoder = make_vision_encoder.build_clip(TINY / "vision_encoder").eval()
    recorded = MANIFEST["quality"]["vision_encoder"]["probes"]
    figures = measure_vision_encoder.probe_families(partial(encode_patches, encoder), share=0.4)
    assert figures.keys() == recorded.keys()
    for family, attributes in figures.items():
        for name, share in attributes.items():
            slack = 0.2 if name.startswith("unseen") else 0.03  # 2 in 5 of the scenes
            assert share >= recorded[family][name] - slack, (family, name)


def test_nothing_that_miniatures_learn_from_holds_an_unseen_pair() -> None:
    for step in (0, 1):
        for scenes, captions in (
            training_images.single_object_scenes(step),
            training_images.whole_scenes(step),
        ):
            assert len(scenes) == len(captions)
            assert all(UNSEEN_PAIRS.get(t.colour) != t.shape for one in scenes for t in one.objects)
        near, captions = training_images.make_close_ups(step, 36)
        assert len({*captions}) == 36 and {one.open().size for one in near} == {(56, 56)}
        things = [one.scene.objects[0] for one in near]
        assert all(UNSEEN_PAIRS.get(t.colour) != t.shape for t in things)
    skills = [Skill(name, language) for name in ANSWERS_PER_DOCUMENT for language in LANGUAGES]
    told = [
        "".join(text for text, _ in make((4, 8), 0, index)).replace(OVERLAY_SEPARATOR, "")
        for make in (make_chat, *(partial(make_skill_document, skill) for skill in skills))
        for index in range(300 if make is make_chat else 15)
    ]
    assert sum("red star" in text for text in told) > 5
    for colour, shape in UNSEEN_PAIRS.items():
        pairs = (
            f"{colour} {shape}",
            f"{CHINESE_WORDS[colour]}的{CHINESE_WORDS[shape]}",
            f"{CHINESE_WORDS[colour]}{CHINESE_WORDS[shape]}",
        )
        assert not any(pair in text for pair in pairs for text in told)


def test_no_answer_of_a_document_can_be_copied_from_an_earlier_one() -> None:
    for name, most in ANSWERS_PER_DOCUMENT.items():
        for language_name in LANGUAGES:
            skill = Skill(name, language_name)
            for index in range(20):
                [_, *pieces] = make_skill_document(skill, (4,), 0, index)
                asked = [
                    about
                    for (about, is_given), (_, is_told) in itertools.pairwise(
                        [("", False), *pieces]
                    )
                    if is_told and not is_given
                ]
                assert 1 <= len(asked) <= most and len({*asked}) == len(asked), skill


def test_several_asks_how_many_where_some_objects_are_alike() -> None:
    for language_name, one in (("en", " One."), ("zh", " 一个。")):
        firsts = Counter[str]()
        for index in range(60):
            [_, (question, _), (answer, _), *_] = make_skill_document(
                Skill("several", language_name), (4,), 0, index
            )
            assert question.startswith(("How many", "图中有几个"))
            assert question not in ("How many objects are there?", "图中有几个物体？")
            firsts[answer] += 1
        assert firsts[one] < 20 and len(firsts) == 4, firsts


def test_a_lesson_ends_when_its_skills_are_known(tokenizer: Tokenizer, monkeypatch) -> None:
    scores, told = language_curriculum.SkillScores(), []
    old, new = Skill("colour", "en"), Skill("shape", "en")
    scores.shares[old] = 0.9
    met = Counter[Skill]()

    def make_document(skill: Skill, *_: object) -> list[tuple[str, bool]]:
        met[skill] += 1
        return [("the star is", False), (" red", True)]

    monkeypatch.setattr(language_curriculum, "make_skill_document", make_document)
    torch.manual_seed(0)
    model = LlamaForCausalLM(make_language_model.language_model_config())
    language_curriculum.teach_lesson(
        model,
        language_curriculum.build_optimizers(model),
        CachedTokenizer(tokenizer),
        language_curriculum.Lesson((new,), 200),
        0,
        scores,
        told.append,
    )
    assert 0.95 <= scores.shares[new] <= 1 and int(told[-1].split()[3]) < 100
    assert met[new] == met[old]  # half of the documents are for what is new


def test_no_odd_colour_could_pass_for_that_of_an_unseen_pair() -> None:
    rng = random.Random(0)
    for colour, shape in UNSEEN_PAIRS.items():
        hue = colorsys.rgb_to_hsv(*COLOURS[colour])[0]
        for odd in [training_images.draw_odd_colour(rng, shape) for _ in range(100)]:
            assert min(math.dist(odd, named) for named in COLOURS.values()) >= 40
            away = abs(colorsys.rgb_to_hsv(*odd)[0] - hue)
            assert max(odd) >= 120 if colour == "black" else min(away, 1 - away) * 360 >= 75


def test_words_over_one_another_stand_at_one_position(
    tokenizer: Tokenizer, language: LlamaForCausalLM
) -> None:
    overlaid = OVERLAY_SEPARATOR.join((" red", " star", "2", "c"))
    text = f"{CELL_SEPARATOR}{overlaid}{CELL_SEPARATOR} .{CELL_SEPARATOR}\n the star is"
    ids, weights = encode_documents(tokenizer, [[(text, False), (" red", True)]])
    plain = [*tokenizer.encode(" ."), *tokenizer.encode("\n the star is red")]
    assert ids.shape == (1, 1 + len(plain), MAX_OVERLAID_WORDS)
    words = [tokenizer.encode(word)[0] for word in (" red", " star", "2", "c")]
    assert ids[0, 0].tolist() == [*words, -1]
    assert ids[0, 1:, 0].tolist() == plain and (ids[0, 1:, 1:] == -1).all()
    assert weights[0, 0] == 0 and weights[0, -1] == 1
    with torch.no_grad():
        shuffled = ids[:, :, [0, 2, 1, 3, 4]]
        assert torch.allclose(
            compute_logits(language, ids),
            compute_logits(language, shuffled),
            atol=1e-5,
        )


def test_perplexity(tokenizer: Tokenizer, language: LlamaForCausalLM) -> None:
    measured = measure_language_model.measure_perplexity(language, tokenizer)
    assert measured <= 1.05 * MANIFEST["quality"]["language"]["perplexity"]


@pytest.mark.slow  # half a minute; the files' hashes are compared in any case
def test_answers_about_scenes_told_in_words(
    tokenizer: Tokenizer, language: LlamaForCausalLM
) -> None:
    figures = measure_language_model.measure_text_answers(language, tokenizer, chats_per_type=100)
    recorded = MANIFEST["quality"]["language"]["text_answers"]
    for kind, share in figures["text_answers"].items():
        assert share >= recorded[kind] - 0.02, kind
    assert max(figures["blank_answers"].values()) <= 0.5


def test_language_model_has_the_architecture_of_yi(language: LlamaForCausalLM) -> None:
    config = language.config
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.rope_parameters["rope_theta"] == 5e6
    assert config.rms_norm_eps == 1e-5 and not config.tie_word_embeddings
    assert config.model_type == "llama"


def test_a_new_language_model_begins_with_heads_that_look_back() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(make_language_model.language_model_config())
    initialize_attention(model)
    model.set_attn_implementation("eager")
    ids = torch.randint(3, make_tokenizer.VOCAB_SIZE, (8, 24))
    seen = model(input_ids=ids, output_attentions=True).attentions[0].mean(0)  # [heads, to, from]
    for head, back in enumerate((1, 2, 3)):
        nearest = seen[head].argmax(-1)[4:]
        assert (torch.arange(4, 24) - nearest == back).float().mean() > 0.8
