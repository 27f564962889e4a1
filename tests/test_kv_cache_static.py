"""Compiled answers: the same tokens as those of a growing cache, from few graphs."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from random_vlm import SMALL, open_gates, small_vlm

from vlbench.compat.transformers_internals import static_cache_position
from vlbench.config import recipe as recipes
from vlbench.connector import registry
from vlbench.data.packing import PackedBatch
from vlbench.data.scene_world import make_scene
from vlbench.errors import UserError
from vlbench.model import lora_adapters
from vlbench.model.build_vlm import build_vlm
from vlbench.model.frozen_bf16 import FrozenBF16
from vlbench.model.generation import decoding_state, step_graph
from vlbench.model.generation.decoding_state import (
    LENGTH_MULTIPLE,
    CompiledDecodeStep,
    StaticDecodingState,
)
from vlbench.model.generation.kv_cache import PrefixCache
from vlbench.model.generation.step_graph import STEPS_BEFORE_CAPTURE
from vlbench.model.loaded_vlm import LoadedVLM

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
def tiny(request) -> LoadedVLM:
    return build_vlm(recipes.load_recipe([f"recipe={request.param}"]).model, 56).eval()


def build_small_vlm(name: str = "llava_mlp") -> LoadedVLM:
    """Return a small random model that never says the stop text, compiled without a compiler."""
    vlm = open_gates(small_vlm(registry.load_connector(name), SMALL.get(name))).eval()
    vlm.processor = replace(
        vlm.processor, template=replace(vlm.processor.template, stop="never said")
    )
    vlm.decode_step = CompiledDecodeStep("eager")
    return vlm


def asks(text: str, *images: Image.Image) -> list[dict[str, Any]]:
    shown = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


def talks(vlm: LoadedVLM, image_count: int = 2) -> PackedBatch:
    """Return prompts of different lengths, of which up to two have an image."""
    shown = [[make_scene("static", 0, n).open()] if n < image_count else [] for n in range(2)]
    long = asks("Which of these two objects, if any, is red? " * 3, *shown[1])
    return vlm.prepare([asks("What is this?", *shown[0]), asks("How are you?"), long])


def assert_same(vlm: LoadedVLM, batch: PackedBatch, **options: Any) -> None:
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
    tiny.decode_step = CompiledDecodeStep("aot_eager")
    for batch in (talks(tiny), talks(tiny, 0)):
        assert_same(tiny, batch, **GREEDY)
        assert_same(tiny, batch, **DRAWN)
    assert graphs() == (0 if tiny.connector.inject_layers else 1)


@pytest.mark.slow
@pytest.mark.parametrize("options", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_torchs_own_compiler_answers_the_same(tiny, options, graphs):
    tiny.decode_step = CompiledDecodeStep()
    assert_same(tiny, talks(tiny), **options)
    assert graphs() == (0 if tiny.connector.inject_layers else 1)


def test_the_beginning_of_prompts_is_read_once_and_all_that_follows_is_compiled(monkeypatch):
    vlm = build_small_vlm()
    read: list[tuple[int, ...]] = []
    real, batch = vlm.model.run_decoder, talks(vlm)

    def watched(embeds, *given, **options):
        if not torch.compiler.is_compiling():
            read.append(tuple(embeds.shape[:2]))
        return real(embeds, *given, **options)

    monkeypatch.setattr(vlm.model, "run_decoder", watched)
    vlm.generate(batch, max_new_tokens=6, compiled=True)
    (once, begin), (rows, rest) = read
    assert (once, rows, begin + rest) == (1, 3, batch.input_ids.shape[1]) and begin > 0


def test_rows_end_where_positions_do():
    vlm = build_small_vlm()
    batch = vlm.prepare([asks("x"), asks("x " * 20)])
    short, long = (batch.sample_index >= 0).sum(1).tolist()
    vlm.language.config.max_position_embeddings = long + 9
    assert_same(vlm, batch, max_new_tokens=10_000)
    new = vlm.generate(batch, max_new_tokens=10_000, compiled=True)
    assert [len(row) for row in new] == [long + 9 - short, 9]
    vlm.language.config.max_position_embeddings = 4096
    assert_same(vlm, batch, max_new_tokens=1)


def test_lengths_are_multiples_and_hold_all_that_is_read(monkeypatch):
    vlm = build_small_vlm()
    seen: list[StaticDecodingState] = []
    real = StaticDecodingState.decode_next
    monkeypatch.setattr(
        StaticDecodingState, "decode_next", lambda s, ids: seen.append(s) or real(s, ids)
    )
    batch = vlm.prepare(asks("x"))
    fits = LENGTH_MULTIPLE - batch.input_ids.shape[1] + 1
    for new, length in ((fits, LENGTH_MULTIPLE), (fits + 1, 2 * LENGTH_MULTIPLE)):
        assert_same(vlm, batch, max_new_tokens=new)
        rows = seen[-1]
        assert rows.attention_mask.shape[-1] == length == rows.kv_cache.layers[0].keys.shape[2]
        assert (
            int(static_cache_position(rows.kv_cache))
            == batch.input_ids.shape[1] + new - 1
            == int(rows.attention_mask.sum())
        )


def test_a_recorded_step_finds_all_that_changes_where_it_was(monkeypatch):
    """A stand-in for CUDA graphs, which read and write the memory that they were recorded with."""
    vlm, recorded = build_small_vlm(), []

    def tensors_of(state: StaticDecodingState) -> list[int]:
        changed = [state.token_ids, state.position_ids, state.attention_mask]
        for layer in state.kv_cache.layers:
            changed += [layer.keys, layer.values, layer.cumulative_length]
        return [tensor.data_ptr() for tensor in changed]

    def record(step, device):
        assert device == vlm.device
        recorded.append(addresses := tensors_of(step.__self__))

        def replay() -> torch.Tensor:
            assert tensors_of(step.__self__) == addresses
            return step()

        return replay

    monkeypatch.setattr(decoding_state, "capture_device", lambda vlm: vlm.device)
    monkeypatch.setattr(step_graph, "capture_cuda_graph", record)
    for new_tokens, graph_count in ((STEPS_BEFORE_CAPTURE + 1, 0), (24, 1)):
        assert_same(vlm, talks(vlm), max_new_tokens=new_tokens)
        assert len(recorded) == graph_count


def test_a_finished_answer_lets_its_cache_go(monkeypatch):
    vlm, seen = build_small_vlm(), []
    real = StaticDecodingState.decode_next
    monkeypatch.setattr(
        StaticDecodingState,
        "decode_next",
        lambda s, ids: seen.append(weakref.ref(s.kv_cache)) or real(s, ids),
    )
    batch = vlm.prepare(asks("x"))
    vlm.generate(batch, max_new_tokens=4, compiled=True)  # the compiler holds on to what it saw
    gc.collect()
    gc.disable()
    try:
        vlm.generate(batch, max_new_tokens=4, compiled=True)
        assert seen and seen[-1]() is None
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.parametrize("connector", ["yivl_llava", "yivl_qformer"])
def test_graphs_of_a_gpu_answer_as_a_growing_cache_does(connector):
    vlm = build_vlm(recipes.load_recipe([f"recipe={connector}"]).model, 56).eval().to("cuda")
    for batch in (talks(vlm), talks(vlm, 0)):
        assert_same(vlm, batch, **GREEDY)
    first = vlm.generate(batch, compiled=True, **GREEDY)
    with ThreadPoolExecutor(2) as threads:  # both record graphs, and the cache of neither moves
        again = list(threads.map(lambda _: vlm.generate(batch, compiled=True, **GREEDY), "ab"))
    assert again == [first, first]


def test_what_was_exchanged_is_compiled_anew(graphs):
    vlm = build_small_vlm()
    batch = talks(vlm)
    assert_same(vlm, batch, max_new_tokens=5)
    for parameter in vlm.language.parameters():  # as a step of training does
        parameter.data += 0.1 * torch.randn_like(parameter)
    assert_same(vlm, batch, max_new_tokens=5)
    assert graphs() == 1
    vlm.set_image_size(56)
    assert_same(vlm, talks(vlm), max_new_tokens=5)
    vlm.to(torch.float64)
    assert_same(vlm, talks(vlm).to("cpu", torch.float64), max_new_tokens=5)
    assert graphs() == 2


def test_adapters_are_compiled_and_weights_are_let_go(graphs):
    vlm = build_small_vlm()
    vlm.model.requires_grad_(False)
    lora_adapters.add_adapters(vlm.language, "language", **LORA)
    for adapter in lora_adapters.adapter_parameters(vlm.language).values():
        adapter.data.normal_(std=0.3)
    assert_same(vlm, talks(vlm), max_new_tokens=8)
    assert graphs() == 1
    kept = [weakref.ref(one) for one in lora_adapters.adapter_parameters(vlm.language).values()]
    del adapter
    lora_adapters.merge_adapters(vlm.language)
    assert_same(vlm, talks(vlm), max_new_tokens=8)
    gc.collect()
    assert kept and not any(one() is not None for one in kept)


@pytest.mark.parametrize("name", ["flamingo", "mixed", "llava_mlp"])
def test_blocks_with_hooks_run_as_they_are(name, graphs):
    vlm = build_small_vlm(name)
    held = None
    if name == "llava_mlp":
        vlm.model.requires_grad_(False)
        for parameter in vlm.language.parameters():
            parameter.data = parameter.data.bfloat16().float()
        held = FrozenBF16(vlm.model)
    assert_same(vlm, talks(vlm), max_new_tokens=8)
    assert graphs() == 0
    if held:
        held.restore_float32()
        assert_same(vlm, talks(vlm), max_new_tokens=8)
        assert graphs() == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"past": PrefixCache(), "compiled": True}, "compiled and past exclude each other"),
        ({"compiled": "yes"}, "compiled is 'yes'; allowed are True and False"),
    ],
)
def test_what_cannot_be_compiled_is_refused(options, said):
    vlm = build_small_vlm()
    with pytest.raises(UserError, match=said) as caught:
        vlm.generate(vlm.prepare(asks("x")), **options)
    assert len(str(caught.value).splitlines()) == 1


def test_without_a_compiler_there_is_one_line():
    from torch._inductor import config

    vlm = build_small_vlm()
    vlm.decode_step = CompiledDecodeStep()
    line = "^compiled: the step .* compiled=False does "
    without = config.patch({"cpp.cxx": ("no-such-compiler",)})
    with without, pytest.raises(UserError, match=line) as caught:
        vlm.generate(vlm.prepare(asks("x")), max_new_tokens=3, compiled=True)
    assert len(str(caught.value).splitlines()) == 1
