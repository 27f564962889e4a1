"""The engine of `serve` answers requests together as it would answer each alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from asked_conversations import answered, ask, build_asked_vlm, make_conversations

from vlbench.errors import EnvironmentFailure, UserError
from vlbench.model.generation.answer_text import AnswerStream, GrowingText
from vlbench.model.generation.decoding_state import CompiledDecodeStep
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.processor import ConversationTooLong
from vlbench.serve.answer_request import AnswerEnd, AnswerRequest, EngineClosing, QueueFull
from vlbench.serve.generation_engine import AnswerHandle, GenerationEngine

WAIT_SECONDS = 120  # a test that waits so long has failed


class Asked:
    """A request that was submitted, and what came back."""

    def __init__(
        self,
        engine: GenerationEngine,
        request: AnswerRequest,
        on_text: Callable[[str], None] | None = None,
    ) -> None:
        self.pieces: list[str] = []
        self.ends: list[AnswerEnd | Exception] = []
        self.has_text, self.has_ended = threading.Event(), threading.Event()
        self.on_text = on_text
        self.handle: AnswerHandle = engine.submit(request, self.take_text, self.take_end)

    def take_text(self, text: str) -> None:
        self.pieces.append(text)
        self.has_text.set()
        if self.on_text:
            self.on_text(text)

    def take_end(self, end: AnswerEnd | Exception) -> None:
        self.ends.append(end)
        self.has_ended.set()

    def text(self) -> str:
        assert self.has_ended.wait(WAIT_SECONDS)
        return "".join(self.pieces)

    def end(self) -> Any:
        assert self.has_ended.wait(WAIT_SECONDS)
        return self.ends[0]


@pytest.fixture(scope="module")
def vlm() -> LoadedVLM:
    return build_asked_vlm("llava_mlp")


@pytest.fixture
def engines() -> Iterator[Callable[..., GenerationEngine]]:
    """Make engines that are closed at the end."""
    made: list[GenerationEngine] = []

    def make(vlm: LoadedVLM, **options: Any) -> GenerationEngine:
        made.append(GenerationEngine(vlm, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


class Gate:
    """Lets the model run a step only when it is told to."""

    def __init__(self, vlm: LoadedVLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        run_decoder = vlm.model.run_decoder

        def wait_and_run(*args: Any, **options: Any) -> Any:
            self.reached.set()
            assert self.open.wait(WAIT_SECONDS)
            return run_decoder(*args, **options)

        monkeypatch.setattr(vlm.model, "run_decoder", wait_and_run)


def simple(text: str = "how are you?", tokens: int = 4, **options: Any) -> AnswerRequest:
    return AnswerRequest([ask(text)], max_new_tokens=tokens, **options)


def chat(vlm: LoadedVLM, request: AnswerRequest) -> str:
    return vlm.chat(
        request.messages,
        request.max_new_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
    )


def check_answers(vlm: LoadedVLM, engine: GenerationEngine, requests: list[AnswerRequest]) -> None:
    asked = [Asked(engine, request) for request in requests]
    for one, request in zip(asked, requests, strict=True):
        assert one.text() == chat(vlm, request)
        assert len(one.ends) == 1 and one.end().finish_reason in ("length", "stop")


def mixed_requests(count: int) -> list[AnswerRequest]:
    """Return requests of which every other one draws its tokens."""
    return [
        AnswerRequest(
            messages, 3 + number % 7, temperature=0.9 * (number % 2), top_p=0.9, seed=number
        )
        for number, messages in enumerate(make_conversations(count))
    ]


def test_answers_are_those_of_chat(engines):
    vlm = build_asked_vlm("deepstack")
    check_answers(vlm, engines(vlm, max_rows=4, prefill_tokens=40), mixed_requests(8))


def test_compiled_answers_are_those_of_chat(vlm, engines):
    engine = engines(vlm, max_rows=4, decode_step=CompiledDecodeStep("eager", any_shape=True))
    assert engine._batch.is_compiled and engine.counts().decode_steps == 0
    check_answers(vlm, engine, mixed_requests(6))


@pytest.mark.gpu
def test_graphs_of_a_gpu_answer_as_chat_does(engines):
    vlm = build_asked_vlm("llava_mlp").to("cuda")
    engine = engines(vlm, max_rows=4, decode_step=CompiledDecodeStep(any_shape=True))
    requests = [AnswerRequest(messages, 24) for messages in make_conversations(12)]
    for _ in range(2):  # the tensors and their graphs go with the last row
        check_answers(vlm, engine, requests)


def test_answers_wait_until_there_is_memory_for_their_rows(vlm, engines, monkeypatch):
    engine, counts = engines(vlm), []
    monkeypatch.setattr(engine._batch, "has_room", lambda rows, longest: rows <= 2)
    add_row = engine._batch.add_row
    monkeypatch.setattr(
        engine._batch,
        "add_row",
        lambda *given: counts.append(len(engine._batch.rows)) or add_row(*given),
    )
    check_answers(vlm, engine, mixed_requests(6))
    assert set(counts) == {0, 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["llava_mlp", "flamingo", "deepstack", "instruct_qformer", "tiled llava_mlp", "tiled flamingo"],
)
def test_many_answers_are_those_of_chat(engines, name):
    vlm = build_asked_vlm(name)
    engine = engines(vlm, max_rows=8, prefill_tokens=24)
    check_answers(vlm, engine, mixed_requests(60))
    assert engine.counts().cached_tokens > 0


def test_a_conversation_that_goes_on_is_told_what_was_known(vlm, engines):
    engine = engines(vlm)
    messages = [ask("what is it?", 1)]
    first = Asked(engine, AnswerRequest(messages, 4))
    messages += [answered(first.text() or "so"), ask("and this?", 2)]
    second = Asked(engine, AnswerRequest(messages, 4))
    assert second.text() == vlm.chat(messages, 4)
    told = second.end()
    assert first.end().cached_tokens == 0
    assert told.cached_tokens >= first.end().prompt_tokens > 0
    assert told.prompt_tokens == vlm.prepare(messages).input_ids.shape[1]
    assert (told.visual_tokens, told.views) == (2 * vlm.connector.tokens_per_image, 2)
    assert (told.completion_tokens, told.finish_reason) == (4, "length")
    assert 0 < told.seconds_to_first_token <= told.seconds
    counts = engine.counts()
    assert counts.cached_tokens == told.cached_tokens and counts.completion_tokens == 8


def test_views_of_tiled_images_are_told_and_limited(engines):
    vlm = build_asked_vlm("tiled flamingo")
    chat, engine = [ask("what is it?", 0, 2)], engines(vlm)
    asked = Asked(engine, AnswerRequest(chat, 4))
    assert asked.text() == vlm.chat(chat, 4)
    assert asked.end().views == asked.end().visual_tokens == 1 + 5
    settings = replace(vlm.processor.view_settings, max_views=5)
    vlm.processor = replace(vlm.processor, view_settings=settings)
    with pytest.raises(UserError, match="has 6 views of its images, and vision.tiling.max_views"):
        Asked(engines(vlm), AnswerRequest(chat, 4))


@pytest.mark.parametrize("length", [3, 9])
def test_nothing_of_a_stop_text_is_shown(vlm, engines, length):
    request = simple(tokens=24)
    whole = chat(vlm, request)
    stop = whole[6 : 6 + length]
    stopped = Asked(engines(vlm), replace(request, stop=("never", stop)))
    assert stopped.text() == whole[: whole.index(stop)].rstrip()
    assert stopped.end().finish_reason == "stop"
    assert stopped.end().completion_tokens < 24


def test_a_stop_text_that_is_not_completed_is_shown(vlm, engines):
    request = simple(tokens=8)
    whole = chat(vlm, request)
    assert Asked(engines(vlm), replace(request, stop=(whole[-3:] + "!",))).text() == whole


def test_a_stop_text_may_end_in_spaces(vlm):
    pieces: list[str] = []
    stream = AnswerStream(vlm.processor, pieces.append, ("\n\n", "b "))
    for text in ("\n", "\na", "\na\n", "\na\nb", "\na\nb c"):
        stream.pass_on(text)
        assert "".join(pieces) in ("", "a")
    assert stream.met_stop_text


def test_a_growing_text_is_decoded_as_a_whole(vlm):
    generator = torch.Generator().manual_seed(0)
    rows = vlm.tokenizer.embedding_rows
    for _ in range(5):
        ids = torch.randint(0, rows, (200,), generator=generator).tolist()
        growing = GrowingText(vlm.tokenizer)
        for length in range(1, len(ids) + 1):
            assert growing.decode(ids[:length]) == vlm.tokenizer.decode(ids[:length])


def test_what_is_cancelled_frees_its_row(vlm, engines, monkeypatch):
    engine = engines(vlm, max_rows=1)
    gate = Gate(vlm, monkeypatch)
    in_prefill = Asked(engine, simple(tokens=400))
    assert gate.reached.wait(WAIT_SECONDS)
    waiting, last = Asked(engine, simple(tokens=400)), Asked(engine, simple())
    in_prefill.handle.cancel()
    waiting.handle.cancel()
    gate.open.set()
    for one in (in_prefill, waiting):
        assert one.end().finish_reason == "cancelled"
    assert waiting.end().seconds_to_first_token is None
    assert last.text() == chat(vlm, simple())
    last.handle.cancel()  # nothing happens
    decoding = Asked(engine, simple(tokens=400))
    assert decoding.has_text.wait(WAIT_SECONDS)
    decoding.handle.cancel()
    assert decoding.end().finish_reason == "cancelled"
    assert len(last.ends) == 1 and engine.counts().answers_cancelled == 3


@pytest.mark.slow
def test_two_hundred_cancelled_answers_leave_nothing(vlm, engines):
    engine = engines(vlm, max_waiting=200, max_rows=8)
    asked = [Asked(engine, simple(f"{number}?", 400)) for number in range(200)]
    for number, one in enumerate(asked):
        if number % 3 == 0:
            one.has_text.wait(WAIT_SECONDS)
        one.handle.cancel()
    assert {one.end().finish_reason for one in asked} == {"cancelled"}
    assert engine.drain(WAIT_SECONDS)
    counts = engine.counts()
    assert (counts.rows_running, counts.requests_waiting, counts.kept_positions) == (0, 0, 0)
    assert not engine._batch.rows and not engine._batch._cache._layers


def test_requests_beyond_those_that_may_wait_are_refused(vlm, engines, monkeypatch):
    engine = engines(vlm, max_rows=1, max_waiting=2)
    gate = Gate(vlm, monkeypatch)
    first = Asked(engine, simple())
    assert gate.reached.wait(WAIT_SECONDS)
    accepted = [first, Asked(engine, simple()), Asked(engine, simple())]
    with pytest.raises(QueueFull, match="2 requests wait"):
        Asked(engine, simple())
    assert engine.counts().requests_waiting == 3
    gate.open.set()
    assert {one.text() for one in accepted} == {chat(vlm, simple())}
    assert Asked(engine, simple()).text()


def test_an_engine_that_drains_ends_what_it_has_accepted(vlm, engines, monkeypatch):
    engine = engines(vlm)
    gate = Gate(vlm, monkeypatch)
    accepted = [Asked(engine, simple(str(number))) for number in range(3)]
    assert not engine.drain(0.01)
    with pytest.raises(EngineClosing):
        Asked(engine, simple())
    gate.open.set()
    assert engine.drain(WAIT_SECONDS)
    assert all(one.ends[0].finish_reason == "length" for one in accepted)


def test_closing_ends_answers_and_the_thread(vlm, engines):
    engine = engines(vlm)
    asked = Asked(engine, simple(tokens=400))
    assert asked.has_text.wait(WAIT_SECONDS)
    engine.close()
    assert isinstance(asked.end(), EngineClosing) and not engine._thread.is_alive()
    with pytest.raises(EngineClosing):
        engine.submit(simple(), print, print)


def test_a_callback_that_raises_ends_its_answer_alone(vlm, engines, caplog):
    engine = engines(vlm)

    def fail(_: object) -> None:
        raise ConnectionError("the client has left")

    broken, whole = Asked(engine, simple(tokens=30), fail), Asked(engine, simple(tokens=30))
    engine.submit(simple(), lambda text: None, fail)
    assert isinstance(broken.end(), ConnectionError) and len(broken.pieces) == 1
    assert whole.text() == chat(vlm, simple(tokens=30))
    assert engine.drain(WAIT_SECONDS)
    assert "the client has left" in caplog.text
    assert engine.counts().answers_failed == 1


def test_an_error_of_the_model_ends_the_answers_it_concerns(engines, monkeypatch):
    vlm = build_asked_vlm("llava_mlp")
    engine = engines(vlm)
    expected = chat(vlm, simple())
    with monkeypatch.context() as broken:
        broken.setattr(vlm.model, "logits", lambda hidden: 1 / 0)
        assert isinstance(Asked(engine, simple()).end(), ZeroDivisionError)
    assert Asked(engine, simple()).text() == expected
    norm = vlm.language.model.norm.weight
    with monkeypatch.context() as broken:
        broken.setattr(norm, "data", norm.data * float("nan"))
        failed = Asked(engine, simple()).end()
        assert isinstance(failed, EnvironmentFailure) and "not finite" in str(failed)
    assert Asked(engine, simple()).text() == expected


@pytest.mark.parametrize(
    ("request_", "error", "line"),
    [
        (simple("word " * 4000), ConversationTooLong, "the language model reads fewer"),
        (simple(temperature=-1.0), UserError, "temperature is -1.0"),
        (simple(tokens=0), UserError, "max_new_tokens is 0"),
        (simple(stop=("",)), UserError, "texts that are not empty"),
        (AnswerRequest([]), UserError, "the conversation is empty"),
        (AnswerRequest([[ask("one")], [ask("two")]]), UserError, "messages are 2 conversations"),
    ],
)
def test_what_is_wrong_with_a_request_is_said_at_once(vlm, engines, request_, error, line):
    with pytest.raises(error, match=line):
        engines(vlm).submit(request_, print, print)
