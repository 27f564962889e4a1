"""Compiled steps of rows that come and go: the same answers, from few graphs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from asked_conversations import ask, build_asked_vlm
from golden_release import CHECKPOINT
from language_folders import FAMILY_OPTIONS, write_language_folder
from test_continuous_batch import alone, check_in_any_order, greedy, prefill

from vlbench.connector import registry
from vlbench.contract_checks.small_model import build_small_vlm
from vlbench.model.generation import continuous_batch, fixed_steps, step_graph
from vlbench.model.generation.continuous_batch import ContinuousBatch
from vlbench.model.generation.decoding_state import CompiledDecodeStep
from vlbench.model.generation.fixed_steps import FixedSteps
from vlbench.model.generation.row_cache import COLUMN_MULTIPLE, CacheView, RowCache
from vlbench.model.generation.step_graph import STEPS_BEFORE_CAPTURE
from vlbench.model.language_model import load_language_model
from vlbench.model.loaded_vlm import LoadedVLM

GraphCount = Callable[[], int]


@pytest.fixture(autouse=True)
def graphs() -> Iterator[GraphCount]:
    """Return a function that counts graphs since the test began; all is without gradients."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.inference_mode():
        yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def compiled_batch(vlm: LoadedVLM, rows: int = 4, backend: str = "eager") -> ContinuousBatch:
    step = CompiledDecodeStep(backend, any_shape=True)
    return ContinuousBatch(vlm.model, vlm.tokenizer.embedding_rows, rows, step)


def check_few_graphs(vlm: LoadedVLM, batch: ContinuousBatch, graphs: GraphCount) -> None:
    """Rows that join and leave are answered from at most two graphs, and then from these."""
    check_in_any_order(vlm, batch)
    row = batch.add_row(prefill(vlm, [ask("word " * COLUMN_MULTIPLE)])[0], greedy())
    batch.step()
    batch.remove_row(row)
    compiled_count = graphs()
    assert 1 <= compiled_count <= 2
    for seed in (1, 2):
        check_in_any_order(vlm, batch, seed)
    assert graphs() == compiled_count


def test_rows_that_join_and_leave_need_two_graphs_at_most(graphs):
    vlm = build_asked_vlm("llava_mlp")
    check_few_graphs(vlm, compiled_batch(vlm), graphs)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compilers_answer_the_same(backend, graphs):
    vlm = build_asked_vlm("llava_mlp")
    check_few_graphs(vlm, compiled_batch(vlm, backend=backend), graphs)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY_OPTIONS)
def test_every_family_of_language_models_is_compiled(name, tmp_path, graphs):
    language = load_language_model(write_language_folder(name, tmp_path), None)
    vlm = build_small_vlm(registry.load_connector("linear"), {}, CHECKPOINT, language).eval()
    check_few_graphs(vlm, compiled_batch(vlm), graphs)


@pytest.mark.parametrize("name", [pytest.param("flamingo", marks=pytest.mark.slow), "deepstack"])
def test_what_is_injected_is_not_compiled(name, graphs):
    vlm = build_asked_vlm(name)
    batch = compiled_batch(vlm)
    assert not batch.is_compiled
    check_in_any_order(vlm, batch)
    assert graphs() == 0


def addresses(steps: FixedSteps, view: CacheView) -> list[int]:
    """Return where all lies that a recorded step reads and writes."""
    tensors = [steps._token_buffer, view.lengths, *sum(view.keys_values, ())]
    return [tensor.data_ptr() for tensor in tensors]


class Recorder:
    """A stand-in for CUDA graphs, which read and write the memory that they were recorded with."""

    def __init__(self) -> None:
        self.row_counts: list[int] = []
        self.views: list[weakref.ref[CacheView]] = []

    def record(self, step: Any, device: torch.device) -> Callable[[], torch.Tensor]:
        steps, view = step.func.__self__, step.args[0]
        self.row_counts.append(view.row_count)
        self.views.append(found := weakref.ref(view))
        at_first, logits = addresses(steps, view), steps._launch(view)

        def replay() -> torch.Tensor:
            assert addresses(steps, found()) == at_first
            return logits.copy_(steps._launch(found()))

        return replay


def test_a_recorded_step_finds_all_that_changes_where_it_was(monkeypatch):
    vlm, recorder = build_asked_vlm("llava_mlp"), Recorder()
    monkeypatch.setattr(fixed_steps, "capture_device", lambda vlm: vlm.device)
    monkeypatch.setattr(step_graph, "capture_cuda_graph", recorder.record)
    chats = [[ask(f"{number}? " + "word " * 3 * number)] for number in range(3)]
    batch, tokens = compiled_batch(vlm), 2 * STEPS_BEFORE_CAPTURE + 4
    expected = [alone(vlm, chat, tokens) for chat in chats]
    rows = [batch.add_row(prefill(vlm, chat)[0], greedy()) for chat in chats[:2]]
    found = [[row.token_id] for row in rows]
    for step in range(tokens + 3):
        if step == STEPS_BEFORE_CAPTURE + 3:  # the tensors grow, and leave the recorded ones
            rows.append(batch.add_row(prefill(vlm, chats[2])[0], greedy()))
            found.append([rows[-1].token_id])
        batch.step()
        for ids, row in zip(found, rows, strict=True):
            ids.append(row.token_id)
    for ids, known in zip(found, expected, strict=True):
        length = min(len(ids), len(known))
        assert ids[:length] == known[:length] and length > STEPS_BEFORE_CAPTURE
    assert recorder.row_counts == [2, 4]
    for row in rows:
        batch.remove_row(row)
    gc.collect()  # the compiler has held on to what it saw
    assert [view() for view in recorder.views] == [None, None]


def test_shapes_are_few_and_bounded():
    cache = RowCache(12, torch.device("cpu"))
    shapes = set()
    for length in (1, 250, 255, 256, 700):
        for _ in range(12):
            cache.add_row([(torch.ones(1, 2, length, 4), torch.ones(1, 2, length, 4))])
            view = cache.begin_fixed_step()
            shapes.add(tuple(view.keys_values[0][0].shape[::2]))
            assert view is cache.begin_fixed_step()
            assert view.row_count >= cache.row_count
        while cache.row_count:
            cache.remove_row(0)
    assert shapes == {(rows, columns) for rows in (2, 4, 8, 12) for columns in (256, 512, 768)}


def test_a_row_that_finds_no_memory_is_not_taken(monkeypatch):
    vlm = build_asked_vlm("llava_mlp")
    batch = compiled_batch(vlm)
    assert batch.has_room(1, 4096)
    batch.add_row(prefill(vlm, [ask("how are you?")])[0], greedy())
    per_position = batch._cache.bytes_per_position()
    layers = batch._cache._layers
    assert per_position == sum(one[0, :, 0].nbytes for pair in layers for one in pair)
    row_bytes = (COLUMN_MULTIPLE + 1 + 2 * 200) * per_position
    for free_bytes, has_room in ((row_bytes, True), (row_bytes - 1, False)):
        monkeypatch.setattr(continuous_batch, "_free_bytes", lambda device, n=free_bytes: n)
        assert batch.has_room(2, 200) is has_room
