"""Compiled answers: the same tokens as those of a growing cache, from few graphs."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from small import SMALL, opened, small_vlm

from vlbench import plugins
from vlbench import recipe as recipes
from vlbench.data.batch import Batch
from vlbench.data.scene_world import scene
from vlbench.mistakes import Mistake
from vlbench.model import lora
from vlbench.model.compose import compose
from vlbench.model.held import Held
from vlbench.model.past import Past
from vlbench.model.static import MULTIPLE, StaticRows, Step
from vlbench.model.vlm import VLM

CONNECTORS = ("yivl_llava", "yivl_qformer", "yivl_flamingo", "yivl_eva")
LORA = {"rank": 3, "alpha": 6.0, "dropout": 0.0, "targets": "all-linear"}
LORA |= {"rslora": False, "dora": False, "bits": None}
GREEDY = {"max_new_tokens": 24}
DRAWN = {**GREEDY, "temperature": 1.0, "top_p": 0.9, "seed": 3}


@pytest.fixture(autouse=True)
def graphs():
    """Return a function that counts graphs since the test began."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.fixture(scope="module", params=CONNECTORS)
def tiny(request) -> VLM:
    return compose(recipes.load([f"recipe={request.param}"]), 56).eval()


def small(name: str = "llava_mlp") -> VLM:
    """Return a small random model that never says the stop text, compiled without a compiler."""
    vlm = opened(small_vlm(plugins.connector(name), SMALL.get(name))).eval()
    vlm.template = replace(vlm.template, stop="never said")
    vlm.step = Step("eager")
    return vlm


def asks(text: str, *images: Image.Image) -> list[dict[str, Any]]:
    shown = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


def talks(vlm: VLM, pictures: int = 2) -> Batch:
    """Return prompts of different lengths, of which up to two have a picture."""
    shown = [[scene("static", 0, n).open()] if n < pictures else [] for n in range(2)]
    long = asks("Which of these two objects, if any, is red? " * 3, *shown[1])
    return vlm.prepare([asks("What is this?", *shown[0]), asks("How are you?"), long])


def assert_same(vlm: VLM, batch: Batch, **options: Any) -> None:
    """Compare all tokens, and what was heard of them on the way."""
    heard: tuple[list, list] = [], []
    growing, static = (
        vlm.generate(
            batch,
            compiled=compiled,
            on_token=lambda new, to=heard[compiled]: to.append([*map(len, new)]),
            **options,
        )
        for compiled in (False, True)
    )
    assert static == growing and heard[1] == heard[0]


def test_answers_are_the_same_and_batches_of_a_shape_share_a_graph(tiny, graphs):
    tiny.step = Step("aot_eager")
    for batch in (talks(tiny), talks(tiny, 0)):
        assert_same(tiny, batch, **GREEDY)
        assert_same(tiny, batch, **DRAWN)
    assert graphs() == (0 if tiny.connector.inject_at else 1)


@pytest.mark.slow
@pytest.mark.parametrize("options", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_torchs_own_compiler_answers_the_same(tiny, options, graphs):
    tiny.step = Step()
    assert_same(tiny, talks(tiny), **options)
    assert graphs() == (0 if tiny.connector.inject_at else 1)


def test_the_beginning_of_prompts_is_read_once_and_all_that_follows_is_compiled(monkeypatch):
    vlm = small()
    read: list[tuple[int, ...]] = []
    real, batch = vlm.read, talks(vlm)

    def watched(embeds, *given, **options):
        if not torch.compiler.is_compiling():
            read.append(tuple(embeds.shape[:2]))
        return real(embeds, *given, **options)

    monkeypatch.setattr(vlm, "read", watched)
    vlm.generate(batch, max_new_tokens=6, compiled=True)
    (once, begin), (rows, rest) = read
    assert (once, rows, begin + rest) == (1, 3, batch.ids.shape[1]) and begin > 0


def test_rows_end_where_positions_do():
    vlm = small()
    batch = vlm.prepare([asks("x"), asks("x " * 20)])
    short, long = (batch.sample_index >= 0).sum(1).tolist()
    vlm.language.config.max_position_embeddings = long + 9
    assert_same(vlm, batch, max_new_tokens=10_000)
    new = vlm.generate(batch, max_new_tokens=10_000, compiled=True)
    assert [len(row) for row in new] == [long + 9 - short, 9]
    vlm.language.config.max_position_embeddings = 4096
    assert_same(vlm, batch, max_new_tokens=1)


def test_lengths_are_multiples_and_hold_all_that_is_read(monkeypatch):
    vlm = small()
    seen: list[StaticRows] = []
    real = StaticRows.follow
    monkeypatch.setattr(StaticRows, "follow", lambda s, ids: seen.append(s) or real(s, ids))
    batch = vlm.prepare(asks("x"))
    fits = MULTIPLE - batch.ids.shape[1] + 1
    for new, length in ((fits, MULTIPLE), (fits + 1, 2 * MULTIPLE)):
        assert_same(vlm, batch, max_new_tokens=new)
        rows = seen[-1]
        assert rows.mask.shape[-1] == length == rows.cache.keys[0].shape[2]
        assert int(rows.cache.at) == batch.ids.shape[1] + new - 1 == int(rows.mask.sum())


def test_what_was_exchanged_is_compiled_anew(graphs):
    vlm = small()
    batch = talks(vlm)
    assert_same(vlm, batch, max_new_tokens=5)
    for parameter in vlm.language.parameters():  # as a step of training does
        parameter.data += 0.1 * torch.randn_like(parameter)
    assert_same(vlm, batch, max_new_tokens=5)
    assert graphs() == 1
    vlm.resize(56)
    assert_same(vlm, talks(vlm), max_new_tokens=5)
    vlm.double()
    assert_same(vlm, talks(vlm).to("cpu", torch.float64), max_new_tokens=5)
    assert graphs() == 2


def test_adapters_are_compiled_and_weights_are_let_go(graphs):
    vlm = small()
    vlm.requires_grad_(False)
    lora.adapt(vlm.language, "language", **LORA)
    for adapter in lora.adapters(vlm.language).values():
        adapter.data.normal_(std=0.3)
    assert_same(vlm, talks(vlm), max_new_tokens=8)
    assert graphs() == 1
    kept = [weakref.ref(one) for one in lora.adapters(vlm.language).values()]
    del adapter
    lora.merge(vlm.language)
    assert_same(vlm, talks(vlm), max_new_tokens=8)
    gc.collect()
    assert kept and not any(one() is not None for one in kept)


@pytest.mark.parametrize("name", ["flamingo", "mixed", "llava_mlp"])
def test_blocks_with_hooks_run_as_they_are(name, graphs):
    vlm = small(name)
    held = None
    if name == "llava_mlp":
        vlm.requires_grad_(False)
        for parameter in vlm.language.parameters():
            parameter.data = parameter.data.bfloat16().float()
        held = Held(vlm)
    assert_same(vlm, talks(vlm), max_new_tokens=8)
    assert graphs() == 0
    if held:
        held.release()
        assert_same(vlm, talks(vlm), max_new_tokens=8)
        assert graphs() == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"past": Past(), "compiled": True}, "compiled and past exclude each other"),
        ({"compiled": "yes"}, "compiled is 'yes'; allowed are True and False"),
    ],
)
def test_what_cannot_be_compiled_is_refused(options, said):
    vlm = small()
    with pytest.raises(Mistake, match=said) as caught:
        vlm.generate(vlm.prepare(asks("x")), **options)
    assert len(str(caught.value).splitlines()) == 1


def test_without_a_compiler_there_is_one_line():
    from torch._inductor import config

    vlm = small()
    vlm.step = Step()
    line = "^compiled: the step .* compiled=False does "
    without = config.patch({"cpp.cxx": ("no-such-compiler",)})
    with without, pytest.raises(Mistake, match=line) as caught:
        vlm.generate(vlm.prepare(asks("x")), max_new_tokens=3, compiled=True)
    assert len(str(caught.value).splitlines()) == 1
