"""Turns of a conversation read on from what was read before, and answer the same."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from vlbench.config import recipe as recipes
from vlbench.data.scene_world import make_scene
from vlbench.errors import UserError
from vlbench.model.build_vlm import build_vlm
from vlbench.model.generation.kv_cache import PrefixCache
from vlbench.model.loaded_vlm import LoadedVLM

CONNECTORS = ("yivl_llava", "yivl_qformer", "yivl_flamingo", "yivl_eva")


@pytest.fixture(scope="module", params=CONNECTORS)
def vlm(request) -> LoadedVLM:
    return build_vlm(recipes.load_recipe([f"recipe={request.param}"]).model, 56).eval()


def asks(text: str, image: Image.Image | None = None) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    return {"role": "user", "content": [{"type": "image", "image": image}] * bool(image) + parts}


def talk(vlm: LoadedVLM, past: PrefixCache | None) -> list[str]:
    """Hold a conversation of three turns, the last with a second image."""
    first, second = (make_scene("past", 0, number).open() for number in (0, 1))
    messages: list[dict[str, Any]] = []
    answers = []
    turns = (("What is this?", first), ("How many objects are there?", None), ("And here?", second))
    for text, image in turns:
        messages.append(asks(text, image))
        answers.append(vlm.chat(messages, max_new_tokens=12, past=past))
        messages.append({"role": "assistant", "content": answers[-1] or "?"})
    return answers


def test_answers_are_the_same_and_only_what_is_new_is_read(vlm, monkeypatch):
    read: list[int] = []
    seen: list[int] = []
    real, features = vlm.model.run_decoder, vlm.model.extract_features

    def watched(embeds, *given, **options):
        read.append(embeds.shape[1])
        return real(embeds, *given, **options)

    def looked(batch):
        seen.append(len(batch.pixels))
        return features(batch)

    monkeypatch.setattr(vlm.model, "run_decoder", watched)
    monkeypatch.setattr(vlm.model, "extract_features", looked)
    anew = talk(vlm, None)
    whole, images = sum(read), sum(seen)
    read.clear()
    seen.clear()
    assert talk(vlm, PrefixCache()) == anew
    assert sum(read) < 0.75 * whole
    assert (sum(seen), images) == (2, 4)  # each image once; without it 1 + 1 + 2


def test_another_conversation_is_read_from_its_beginning(vlm):
    past = PrefixCache()
    vlm.chat([asks("What is this?", make_scene("past", 0, 0).open())], max_new_tokens=5, past=past)
    other = [asks("What is this?", make_scene("past", 0, 2).open())]
    alone = vlm.chat(other, max_new_tokens=12)
    assert vlm.chat(other, max_new_tokens=12, past=past) == alone
    text = [asks("How are you?")]
    assert vlm.chat(text, max_new_tokens=8, past=past) == vlm.chat(text, max_new_tokens=8)


def test_what_was_stopped_is_read_anew(vlm, monkeypatch):
    past = PrefixCache()
    messages = [asks("What is this?", make_scene("past", 0, 0).open())]

    def stops(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vlm.chat(messages, max_new_tokens=12, past=past, stream=stops)
    assert past.kv_cache is None
    assert vlm.chat(messages, max_new_tokens=12, past=past) == vlm.chat(messages, max_new_tokens=12)


def test_one_past_is_of_one_conversation(vlm):
    batch = vlm.prepare([[asks("one")], [asks("two")]])
    with pytest.raises(UserError, match="past belongs to one conversation, and the batch has 2"):
        vlm.generate(batch, past=PrefixCache())


def test_what_prompts_begin_with_is_read_once_for_all(vlm, monkeypatch):
    image = make_scene("past", 0, 0).open()
    talks = [
        [asks("What is this?", image)],
        [asks("How are you?")],
        [asks("Which of these two objects, if any, is red?" * 3, image)],
    ]
    alone = [vlm.generate(vlm.prepare(talk), max_new_tokens=8)[0] for talk in talks]
    read: list[tuple[int, ...]] = []
    real = vlm.model.run_decoder

    def watched(embeds, *given, **options):
        read.append(tuple(embeds.shape[:2]))
        return real(embeds, *given, **options)

    monkeypatch.setattr(vlm.model, "run_decoder", watched)
    batch = vlm.prepare(talks)
    assert vlm.generate(batch, max_new_tokens=8) == alone
    beginning = len(vlm.tokenizer.encode(vlm.processor.template.system))
    (once, begin), (rows, rest) = read[:2]
    assert (once, rows, begin + rest) == (1, 3, batch.input_ids.shape[1])
    assert begin >= beginning > 0


def test_a_prompt_has_its_last_token_read_even_where_all_are_the_same(vlm):
    talk = [asks("How are you?")]
    alone = vlm.generate(vlm.prepare(talk), max_new_tokens=8)[0]
    assert vlm.generate(vlm.prepare([talk, talk]), max_new_tokens=8) == [alone, alone]
