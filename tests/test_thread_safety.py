"""One model asked by several threads at once answers each as if it were alone."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from random_vlm import SMALL, make_batch, make_sample, open_gates, small_vlm
from torch import nn

from vlbench.connector import registry
from vlbench.data.scene_world import make_scene
from vlbench.evaluate.attention_diagnostics import diagnose_answers
from vlbench.evaluate.heldout_questions import EvalQuestion
from vlbench.model.compile_blocks import CompiledBlocks
from vlbench.model.eval_copy import in_eval_mode
from vlbench.model.generation.decoding_state import CompiledDecodeStep
from vlbench.model.generation.kv_cache import PrefixCache
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.vlm import VLM

THREADS, ANSWERS = 4, 200
DRAWN = {"temperature": 1.0, "top_p": 0.9}
Work = Callable[[LoadedVLM], Any]


def model(name: str) -> LoadedVLM:
    """Return a small random model that never says the stop text."""
    vlm = open_gates(small_vlm(registry.load_connector(name), SMALL.get(name)))
    vlm.processor = replace(
        vlm.processor, template=replace(vlm.processor.template, stop="never said")
    )
    return vlm


def asks(text: str, *images: Image.Image) -> list[dict[str, Any]]:
    shown = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


def greedy(number: int) -> Work:
    picture = make_scene("static", 0, number % 3).open()
    return lambda vlm: vlm.chat(asks(f"{number}?", picture), max_new_tokens=6)


def drawn(number: int) -> Work:
    return lambda vlm: vlm.chat(asks("and " * (number % 7)), 6, seed=number, **DRAWN)


def batched(number: int) -> Work:
    pictures = [make_scene("static", 0, n).open() for n in range(2)]
    several = [asks("What?", pictures[0]), asks(f"Why {number}? " * 4, *pictures), asks("a")]

    def work(vlm: LoadedVLM) -> Any:
        return vlm.generate(vlm.prepare(several), max_new_tokens=5, seed=number)

    return work


def turns(number: int) -> Work:
    """Ask twice in one conversation, of which the beginning is read once."""

    def work(vlm: LoadedVLM) -> Any:
        past, talk = PrefixCache(), asks(f"{number}?", make_scene("static", 0, 1).open())
        first = vlm.chat(talk, 4, past=past)
        talk = [*talk, {"role": "assistant", "content": first}, *asks("more?")]
        return first, vlm.chat(talk, 4, past=past)

    return work


def forward(number: int) -> Work:
    """Read a packed row, as training does, and find what a connector attends to."""

    def work(vlm: LoadedVLM) -> Any:
        batch = make_batch(vlm, [[make_sample(number), make_sample(number + 1, images=2)]])
        with torch.no_grad():
            told = vlm.connector.patch_attention(vlm.features(batch))
            return float(vlm(batch).loss_sum), None if told is None else told.tolist()

    return work


KINDS = (greedy, drawn, batched, turns, forward)


def at_once(vlm: LoadedVLM, works: list[Work]) -> list[Any]:
    """Return what the works give when THREADS threads share them; all begin together."""
    ready = threading.Barrier(THREADS)

    def some(first: int) -> list[Any]:
        ready.wait()
        return [work(vlm) for work in works[first::THREADS]]

    with ThreadPoolExecutor(THREADS) as pool:
        parts = list(pool.map(some, range(THREADS)))
    return [parts[n % THREADS][n // THREADS] for n in range(len(works))]


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(
    "name",
    ["llava_mlp", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qformer", "flamingo"))],
)
def test_four_threads_get_the_answers_of_one(name, mode):
    vlm = model(name).train(mode == "train")
    number = ANSWERS if mode == "eval" else ANSWERS // 5
    works = [KINDS[n % len(KINDS)](n) for n in range(number)]
    alone = [work(vlm) for work in works]
    together = at_once(vlm, works)
    assert together == alone
    assert len({str(answer) for answer in alone}) > number // 4  # they depend on the question


def test_compiled_answers_of_four_threads_are_those_of_one():
    vlm = model("llava_mlp").eval()
    batch = vlm.prepare(
        [asks("What is this?"), asks("Why? " * 9, make_scene("static", 0, 1).open())]
    )
    vlm.decode_step = CompiledDecodeStep("eager")

    def work(seed: int) -> Work:
        return lambda vlm: vlm.generate(batch, max_new_tokens=5, compiled=True, seed=seed, **DRAWN)

    works = [work(seed) for seed in range(16)]
    expected = [vlm.generate(batch, max_new_tokens=5, seed=n, **DRAWN) for n in range(16)]
    limit = torch._dynamo.config.recompile_limit
    assert at_once(vlm, works) == expected
    assert torch._dynamo.config.recompile_limit == limit


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_switched_while_an_answer_is_written(compiled, training):
    vlm = model("flamingo").train(training)
    vlm.vision.eval()
    state = [(module.training, dict(vars(module))) for module in vlm.model.modules()]
    config = vlm.language.config.to_dict(), vlm.language.config._attn_implementation
    seen = []

    def look(_: object) -> None:
        seen.append(1)
        now = [(module.training, dict(vars(module))) for module in vlm.model.modules()]
        assert now == state
        now = vlm.language.config.to_dict(), vlm.language.config._attn_implementation
        assert now == config

    batch = vlm.prepare([asks("What?"), asks("Why is that? ", make_scene("static", 0, 1).open())])
    vlm.generate(batch, max_new_tokens=4, on_token=look, compiled=compiled)
    assert len(seen) == 4


class Noisy(nn.Module):
    """A layer that adds noise while it trains, as dropout does."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + torch.randn_like(hidden) if self.training else hidden


@pytest.mark.parametrize("recomputes", ["none", "full"])
@pytest.mark.parametrize("name", ["llava_mlp", "flamingo"])
def test_a_model_that_trains_answers_as_in_evaluation(name, recomputes):
    vlm = model(name)
    vlm.connector.add_module("noisy", Noisy())
    vlm.connector.register_forward_hook(lambda module, _, out: module.noisy(out))
    asked = [asks("What?", make_scene("static", 0, 1).open()), asks("Why is it so? " * 3)]
    expected = vlm.eval().generate(vlm.prepare(asked), max_new_tokens=6)
    vlm.train().model.enable_activation_checkpointing(recomputes)
    assert vlm.generate(vlm.prepare(asked), max_new_tokens=6) == expected
    assert all(module.training for module in vlm.model.modules())


def test_a_copy_in_evaluation_shares_weights_and_nothing_else():
    vlm = model("flamingo").train()
    blocks = CompiledBlocks(vlm.model, backend="eager")
    other = in_eval_mode(vlm.model)
    assert in_eval_mode(other) is other and type(other) is VLM
    mine, theirs = dict(vlm.model.named_modules()), dict(other.named_modules())
    assert list(mine) == list(theirs)
    assert not {id(one) for one in mine.values()} & {id(one) for one in theirs.values()}
    for (name, one), (_, two) in zip(
        vlm.model.named_parameters(), other.named_parameters(), strict=True
    ):
        assert one is two, name
    layer = other.language.model.layers[0]
    (hook,) = layer._forward_pre_hooks.values()
    assert hook.args[0] is other
    assert layer.forward.args[0] is other and layer.forward.args[1].__self__ is layer
    blocks.restore_forward()
    assert all(module.training for module in mine.values())
    assert not any(module.training for module in theirs.values())


def test_a_deep_copy_uses_its_own_connector():
    vlm = model("flamingo").eval()
    batch = vlm.prepare(asks("What?", make_scene("static", 0, 1).open()))
    other = copy.deepcopy(vlm)
    before = vlm(batch).logits
    assert torch.equal(other(batch).logits, before)
    for parameter in other.connector.parameters():
        parameter.data.normal_()
    assert torch.equal(vlm(batch).logits, before)
    assert not torch.equal(other(batch).logits, before)


def test_what_an_answer_owes_is_found_in_four_threads():
    vlm = model("qformer").train()
    kept = replace(make_sample(2, images=1), turns=make_sample(2, images=1).turns[:1])
    works: list[Work] = [
        lambda vlm, n=n: diagnose_answers(
            vlm, [(EvalQuestion(kept, "two", "", "en"), f"three {n}")]
        )
        for n in range(12)
    ]
    alone = [work(vlm) for work in works]
    assert at_once(vlm, works) == alone


def test_a_host_that_passes_a_padding_mask_or_a_cache_is_understood():
    """transformers' own `generate` and `forward` of the language model work as with sdpa."""
    vlm = model("llava_mlp").eval()
    torch.manual_seed(1)
    ids = torch.randint(5, 900, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    given = {"input_ids": ids, "attention_mask": mask}

    def told() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            logits = vlm.language(**given).logits[:, 4:]
        options = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
        return logits, vlm.language.generate(**given, **options)

    ours = told()
    vlm.language.set_attn_implementation("sdpa")
    theirs = told()
    torch.testing.assert_close(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
