"""Rows that join and leave answer as if each were alone."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from asked_conversations import TILED, answered, ask, build_asked_vlm, make_conversations
from golden_release import CHECKPOINT
from language_folders import FAMILY_OPTIONS, write_language_folder

from vlbench.connector import registry
from vlbench.contract_checks.small_model import build_small_vlm
from vlbench.model.generation.continuous_batch import BatchRow, ContinuousBatch
from vlbench.model.generation.prefix_pool import PrefixPool, position_keys
from vlbench.model.generation.prompt_prefill import PromptPrefill
from vlbench.model.generation.token_sampling import (
    NONFINITE_ID,
    RowSampler,
    sample_next_ids,
    sample_rows,
)
from vlbench.model.language_model import load_language_model
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.processor import ChatMessage

CONNECTORS = [
    "llava_mlp",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("deepstack", "flamingo", "cross_attention", "instruct_qformer", "mixed")
    ),
    "tiled flamingo",
    *(
        pytest.param(f"tiled {name}", marks=pytest.mark.slow)
        for name in TILED
        if name != "flamingo"
    ),
]
"""What fills positions, what does and injects as well, what injects alone, and what reads the
question; and the same with images of several views."""


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def greedy() -> RowSampler:
    return RowSampler(0.0, 1.0, torch.Generator())


def prefill(
    vlm: LoadedVLM, messages: list[ChatMessage], pool: PrefixPool | None = None, piece: int = 4096
) -> tuple[PromptPrefill, list[int]]:
    """Compute a prompt in pieces; return it and what each piece took."""
    batch = vlm.prepare(messages)
    prompt = PromptPrefill(vlm.model, batch, position_keys(batch), pool or PrefixPool(0))
    taken = []
    while prompt.logits is None:
        taken.append(prompt.advance(piece))
    return prompt, taken


def alone(vlm: LoadedVLM, messages: list[ChatMessage], tokens: int) -> list[int]:
    return vlm.generate(vlm.prepare(messages), max_new_tokens=tokens)[0]


def new_batch(vlm: LoadedVLM, rows: int = 8) -> ContinuousBatch:
    return ContinuousBatch(vlm.model, vlm.tokenizer.embedding_rows, rows)


def answer(
    batch: ContinuousBatch, prompt: PromptPrefill, tokens: int, pool: PrefixPool | None = None
) -> list[int]:
    """Answer one prompt in a batch, and keep what was computed."""
    row = batch.add_row(prompt, greedy())
    new_ids = [row.token_id]
    while len(new_ids) < tokens:
        batch.step()
        new_ids.append(row.token_id)
    if pool:
        pool.add_prefix(batch.copy_prefix(row, new_ids))
    batch.remove_row(row)
    return new_ids


def check_in_any_order(vlm: LoadedVLM, batch: ContinuousBatch, seed: int = 0) -> None:
    """Let rows join and leave a batch of at most 4 in any order; each answers as alone."""
    rng = random.Random(seed)
    asked = [(chat, rng.randrange(1, 7)) for chat in make_conversations(8)]
    expected = [alone(vlm, chat, tokens) for chat, tokens in asked]
    waiting = rng.sample(range(len(asked)), len(asked))
    found: dict[int, list[int]] = {}
    running: dict[int, BatchRow] = {}
    while waiting or running:
        if waiting and len(running) < 4 and (not running or rng.random() < 0.6):
            number = waiting.pop()
            running[number] = batch.add_row(prefill(vlm, asked[number][0])[0], greedy())
            found[number] = [running[number].token_id]
        else:
            batch.step()
            for number, row in running.items():
                found[number].append(row.token_id)
        for number in [n for n in running if len(found[n]) == len(expected[n])]:
            batch.remove_row(running.pop(number))
    assert [found[number] for number in range(len(asked))] == expected
    assert not batch.rows


@pytest.mark.parametrize("name", CONNECTORS)
def test_rows_that_join_and_leave_in_any_order_answer_as_alone(name):
    vlm = build_asked_vlm(name)
    check_in_any_order(vlm, new_batch(vlm, 4))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY_OPTIONS)
def test_every_family_of_language_models_is_decoded_in_rows(name, tmp_path):
    language = load_language_model(write_language_folder(name, tmp_path), None)
    vlm = build_small_vlm(registry.load_connector("linear"), {}, CHECKPOINT, language).eval()
    chats = [[ask("how are you? " * 9, 1)], [ask("what?")]]
    batch = new_batch(vlm)
    rows = [batch.add_row(prefill(vlm, chat)[0], greedy()) for chat in chats]
    found = [[row.token_id] for row in rows]
    for _ in range(3):
        batch.step()
        for ids, row in zip(found, rows, strict=True):
            ids.append(row.token_id)
    for ids, chat in zip(found, chats, strict=True):
        expected = alone(vlm, chat, 4)
        assert ids[: len(expected)] == expected


@pytest.mark.parametrize("name", CONNECTORS)
def test_a_prompt_in_pieces_is_the_prompt_at_once(name):
    vlm = build_asked_vlm(name)
    chat = [ask("word " * 9, 1, 2), answered("so it is"), ask("and " * 30, 3)]
    whole, _ = prefill(vlm, chat)
    pieces, taken = prefill(vlm, chat, piece=8)
    assert max(taken) <= 8 and len(taken) > 10
    torch.testing.assert_close(pieces.logits, whole.logits)
    assert answer(new_batch(vlm), pieces, 4) == alone(vlm, chat, 4)


@pytest.mark.parametrize("name", CONNECTORS)
def test_what_a_prompt_shares_with_earlier_ones_is_not_computed_again(name, monkeypatch):
    vlm, pool = build_asked_vlm(name), PrefixPool(4096)
    batch, chat, length_before = new_batch(vlm), [], 1
    encoded: list[int] = []
    encode = vlm.model.encode_images
    for turn, images in enumerate(((), (1, 1), (), (2,))):
        chat = [*chat, ask(f"{turn}? " + "word " * 5, *images)]
        expected = alone(vlm, chat, 5)
        with monkeypatch.context() as watched:
            watched.setattr(
                vlm.model, "encode_images", lambda b: encoded.append(len(b.pixels)) or encode(b)
            )
            prompt, taken = prefill(vlm, chat, pool)
        assert answer(batch, prompt, 5, pool) == expected
        assert (prompt.cached_count >= length_before) == (turn > 0)
        length_before = prompt.length
        chat = [*chat, answered("it is")]
    assert sum(encoded) == len(vlm.prepare(chat[:-1]).pixels) >= 3  # each view once


def test_the_prefix_ends_where_an_image_differs():
    vlm, pool = build_asked_vlm("llava_mlp"), PrefixPool(4096)
    batch = new_batch(vlm)
    answer(batch, prefill(vlm, [ask("what is it?", 1, 2)], pool)[0], 3, pool)
    other = [ask("what is it?", 1, 3)]
    prompt, _ = prefill(vlm, other, pool)
    positions = vlm.connector.tokens_per_image
    before_second = position_keys(vlm.prepare(other)).lt(0).nonzero()[positions]
    assert prompt.cached_count == int(before_second)
    assert answer(batch, prompt, 4) == alone(vlm, other, 4)


def test_a_pool_keeps_what_was_used_last_within_its_positions():
    vlm = build_asked_vlm("llava_mlp")
    batch, pool = new_batch(vlm), PrefixPool(400)
    chats = [[ask(f"{word} " * 30)] for word in ("one", "two", "three", "four", "five")]
    for chat in chats:
        answer(batch, prefill(vlm, chat, pool)[0], 2, pool)
        assert 0 < pool.position_count <= 400
    first, last = (prefill(vlm, chat, pool)[0] for chat in (chats[0], chats[-1]))
    assert last.cached_count == last.length - 1 > first.cached_count
    answer(batch, prefill(vlm, [*chats[-1], answered("so"), ask("and?")], pool)[0], 2, pool)
    assert pool.position_count <= 400
    nothing = PrefixPool(0)
    answer(batch, prefill(vlm, chats[0], nothing)[0], 2, nothing)
    assert nothing.position_count == 0


def test_rows_draw_as_they_do_alone():
    torch.manual_seed(0)
    logits = 3 * torch.randn(4, 50)
    logits[2] = float("nan")
    options = ((0.7, 0.9), (0.0, 1.0), (1.0, 0.5), (1.3, 1.0))

    def samplers() -> list[RowSampler]:
        generators = [torch.Generator().manual_seed(row) for row in range(4)]
        return [RowSampler(*pair, one) for pair, one in zip(options, generators, strict=True)]

    together, each = samplers(), samplers()
    for _ in range(20):
        ids = sample_rows(logits, together).tolist()
        assert ids == [
            sample_next_ids(logits[row : row + 1], one.temperature, one.top_p, one.generator).item()
            for row, one in enumerate(each)
        ]
        assert ids[2] == NONFINITE_ID and ids[1] == logits[1].argmax()


def test_numbers_of_a_row_that_left_do_not_reach_the_next():
    vlm = build_asked_vlm("llava_mlp")
    batch, chat = new_batch(vlm), [ask("how are you?")]
    expected = alone(vlm, chat, 5)
    kept = batch.add_row(prefill(vlm, [ask("another")])[0], greedy())
    broken = batch.add_row(prefill(vlm, [ask("word " * 40)])[0], greedy())
    for _, values in batch._cache._layers:
        values[1] = float("nan")
    batch.step()
    assert broken.token_id == NONFINITE_ID != kept.token_id
    batch.remove_row(broken)
    assert answer(batch, prefill(vlm, chat)[0], 5) == expected
    batch.remove_row(kept)
    assert not batch._cache._layers


def test_a_step_that_failed_may_be_done_again(monkeypatch):
    vlm = build_asked_vlm("llava_mlp")
    batch, chat = new_batch(vlm), [ask("how are you?")]
    expected = alone(vlm, chat, 4)
    row = batch.add_row(prefill(vlm, chat)[0], greedy())
    found = [row.token_id]
    last_layer = vlm.language.model.layers[-1]
    for _ in range(3):
        with monkeypatch.context() as broken:
            broken.setattr(last_layer, "forward", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                batch.step()
        batch.step()
        found.append(row.token_id)
    assert found == expected
