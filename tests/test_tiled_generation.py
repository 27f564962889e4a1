"""Answers about images of several views: with a cache, in one batch and compiled, all the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from asked_conversations import TILED, answered, ask, build_asked_vlm, noise, recomputed

from vlbench.contract_checks.small_model import make_question
from vlbench.data.sample_encoding import IMAGE_TOKEN_INDEX
from vlbench.model.generation.decoding_state import CompiledDecodeStep
from vlbench.model.generation.kv_cache import PrefixCache
from vlbench.model.generation.prefix_pool import position_keys
from vlbench.model.loaded_vlm import LoadedVLM


def names(quick: str, *others: str):
    """Return connectors as parameters, all but `quick` for slow tests."""
    return [quick, *(pytest.param(one, marks=pytest.mark.slow) for one in others if one != quick)]


def build(name: str) -> LoadedVLM:
    """Return a tiled model in float64, so that ways to compute the same agree."""
    return build_asked_vlm(f"tiled {name}").to(torch.float64)


def question(number: int, *images: int):
    """Return a question about images of noise, by their seeds."""
    asked = make_question(number, len(images), 9 * number)
    return replace(asked, images=tuple(map(noise, images)))


@pytest.mark.parametrize("name", names("flamingo", *TILED))
def test_prompts_in_one_batch_are_answered_as_each_is_recomputed(name):
    vlm = build(name)
    asked = [question(1, 1), question(2, 2, 0, 3), question(3)]
    batch = vlm.processor.collate_prompts(asked)
    assert len(set(batch.view_bounds.diff().tolist())) > 1
    answers = vlm.generate(batch, max_new_tokens=4)
    for one, found in zip(asked, answers, strict=True):
        prompt = vlm.processor.collate_prompts([one])
        assert recomputed(vlm, prompt, len(found)) == found


@pytest.mark.parametrize("name", names("llava_mlp", *TILED))
def test_images_of_later_turns_are_cached_as_they_are_computed(name):
    vlm, past, chat = build(name), PrefixCache(), []
    encoded: list[int] = []
    encode = vlm.model.encode_images
    for images in ((), (1,), (2, 3), ()):
        chat = [*chat, ask("what? " * 3, *images)]
        batch = vlm.prepare(chat)
        expected = recomputed(vlm, batch, 4)
        vlm.model.encode_images = lambda given: encoded.append(len(given.pixels)) or encode(given)
        found = vlm.generate(batch, max_new_tokens=4, past=past)
        del vlm.model.encode_images
        assert found == [expected[: len(found[0])]]
        chat = [*chat, answered("it is")]
    assert sum(encoded) == len(batch.pixels) > 3  # each view once


@pytest.mark.parametrize("name", names("flamingo", *TILED))
def test_compiled_answers_are_those_of_a_growing_cache(name):
    """Layers into which a connector injects are not compiled, but have the static cache as well."""
    vlm = build(name)
    vlm.decode_step = CompiledDecodeStep("aot_eager")
    batch = vlm.processor.collate_prompts([question(1, 1, 2), question(2), question(3, 3)])
    growing, static = (vlm.generate(batch, max_new_tokens=5, compiled=one) for one in (False, True))
    assert static == growing
    torch._dynamo.reset()  # so that other tests count their own graphs


def test_an_image_whose_tokens_stand_otherwise_is_another_one():
    vlm = build("llava_mlp")
    batch = vlm.prepare([ask("what is it?", 1, 3)])
    keys, past = position_keys(batch), PrefixCache()
    assert keys.equal(position_keys(batch))
    order = batch.visual_index.clone()
    order[:2] = order[:2].flip(0)
    other = replace(batch, visual_index=order)
    differs = keys != position_keys(other)
    first = (batch.image_index[0] == 0) & (batch.input_ids[0] == IMAGE_TOKEN_INDEX)
    assert differs.equal(first)
    assert vlm.generate(batch, 3, past=past) == vlm.generate(batch, 3)
    assert vlm.generate(other, 3, past=past) == vlm.generate(other, 3)
    assert past._visual_index.equal(order)
    fewer = replace(batch, view_bounds=batch.view_bounds[[0, 2]])
    assert past._count_known_views(other) == len(batch.pixels)
    assert not past._count_known_views(batch) and not past._count_known_views(fewer)


@pytest.mark.parametrize("name", names("flamingo", "cross_attention", "mixed"))
def test_text_looks_at_every_view_of_its_image_and_at_none_of_another(name):
    vlm = build(name)
    batch = vlm.processor.collate_prompts([question(2, 2, 3)])
    levels = vlm.features(batch)
    levels = levels if isinstance(levels, tuple) else (levels,)
    features = torch.stack(levels, dim=1).requires_grad_()  # as they are cached
    batch = replace(batch, features=features if len(levels) > 1 else features[:, 0])
    where = vlm.model.image_places(batch)
    hidden = torch.randn(*batch.input_ids.shape, 32, dtype=torch.float64)
    out = vlm.connector.inject(vlm.connector.inject_layers[0], hidden, vlm.visual(batch), where)
    bounds = batch.list_view_bounds()
    for image in (0, 1):
        seen = out[batch.image_index == image].sum()
        (gradient,) = torch.autograd.grad(seen, features, retain_graph=True)
        by_view = gradient.flatten(1).abs().sum(1) > 0
        own = slice(bounds[image], bounds[image + 1])
        assert by_view[own].all() and int(by_view.sum()) == bounds[image + 1] - bounds[image] > 1
