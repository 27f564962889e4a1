"""OpenAI's own client against the server: answers, streams, errors, and clients that leave."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from api_server import running_server
from fake_engine import FAIL, REFUSE, VISUAL_TOKENS, FakeEngine, fake_model
from PIL import Image, ImageChops

from vlbench.data.scene_world import make_scene
from vlbench.serve.api import answer_stream
from vlbench.serve.api.api_settings import ApiSettings

ENGINE = FakeEngine()
SLOW = FakeEngine(max_rows=1, max_waiting=1, delay=0.01)


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with running_server([fake_model("fake", ENGINE), fake_model("runs/slow", SLOW)]) as (_, port):
        yield client_of(port)


def client_of(port: int, key: str = "none", kind: type[Any] = openai.OpenAI) -> Any:
    return kind(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, timeout=20)


def says(text: str, *images: Image.Image) -> dict[str, Any]:
    shown = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    content = [*shown, {"type": "text", "text": text}] if images else text
    return {"role": "user", "content": content}


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def ask(client: openai.OpenAI, *messages: Any, **options: Any) -> Any:
    options = {"model": "fake", **options}
    return client.chat.completions.create(messages=list(messages) or [says("a b c")], **options)


def test_a_question_is_answered_whole(client):
    answer = ask(client, says("what is this"))
    choice = answer.choices[0]
    assert (choice.message.content, choice.message.role) == ("what is this", "assistant")
    assert (choice.finish_reason, answer.object) == ("stop", "chat.completion")
    assert answer.id.startswith("chatcmpl-") and answer.model == "fake"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (10, 3, 13)
    assert usage.prompt_tokens_details.cached_tokens == 3
    assert usage.prompt_tokens_details.visual_tokens == 0


def test_a_stream_has_role_text_reason_and_usage(client):
    options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 2}
    chunks = list(ask(client, says("eins zwei drei"), **options))
    assert len({chunk.id for chunk in chunks}) == 1
    *first, last, usage = chunks
    assert first[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.content for chunk in first] == ["", "eins", " zwei"]
    assert last.choices[0].finish_reason == "length" and not last.choices[0].delta.content
    assert usage.choices == [] and usage.usage.completion_tokens == 2
    assert all(chunk.usage is None for chunk in chunks[:-1])
    raw = client.chat.completions.with_raw_response.create(
        model="fake", messages=[says("a b")], stream=True
    )
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert raw.http_response.read().decode().endswith("data: [DONE]\n\n")
    assert '"usage"' not in raw.http_response.text


def test_a_stream_without_text_for_a_while_is_kept_alive(client, monkeypatch):
    monkeypatch.setattr(answer_stream, "KEEP_ALIVE_SECONDS", 0.002)
    options = {"model": "runs/slow", "stream": True}
    chunks = list(ask(client, says("one two"), **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one two"
    raw = client.chat.completions.with_raw_response.create(messages=[says("a b")], **options)
    assert b": the answer goes on" in raw.http_response.read()


def test_images_turns_and_options_reach_the_engine(client):
    pictures = [make_scene("api", 0, number).open() for number in range(3)]
    talk = [
        {"role": "developer", "content": [{"type": "text", "text": "Be short."}]},
        says("two", *pictures[:2]),
        {"role": "assistant", "content": "fine", "refusal": None, "tool_calls": None},
        says("and this", pictures[2]),
    ]
    options = {"temperature": 0.5, "top_p": 0.9, "seed": -1, "stop": ["x", "y"]}
    answer = ask(client, *talk, max_completion_tokens=7, **options)
    assert answer.usage.prompt_tokens_details.visual_tokens == 3 * VISUAL_TOKENS
    request = ENGINE.requests[-1]
    assert [message["role"] for message in request.messages] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    images = [part["image"] for i in (1, 3) for part in request.messages[i]["content"][:-1]]
    for sent, picture in zip(images, pictures, strict=True):
        assert not ImageChops.difference(sent, picture).getbbox()
    assert (request.temperature, request.top_p, request.seed) == (0.5, 0.9, 2**64 - 1)
    assert (request.max_new_tokens, request.stop) == (7, ("x", "y"))


def test_what_is_not_said_is_greedy_and_seeds_are_drawn_anew(client):
    seeds = {ask(client).seed for _ in range(2)}
    request = ENGINE.requests[-1]
    assert (request.temperature, request.top_p, request.max_new_tokens) == (0.0, 1.0, 512)
    assert len(seeds) == 2 and request.seed in seeds
    ask(client, stop="x")
    assert ENGINE.requests[-1].stop == ("x",)


def test_fields_that_change_nothing_are_accepted(client):
    neutral = {"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logprobs": False}
    more = {"response_format": {"type": "text"}, "user": "me", "metadata": {"a": "b"}}
    extra = {"logit_bias": {}, "tools": [], "tool_choice": "none", "modalities": ["text"]}
    extra |= {"audio": None, "top_k": None, "stop": None, "max_tokens": None, "seed": None}
    options = {**neutral, **more, "store": False, "extra_body": extra}
    assert ask(client, **options).choices[0].message.content == "a b c"


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("n", True),
        ("tools", [TOOL]),
        ("logit_bias", {"5": 1}),
        ("logprobs", True),
        ("response_format", {"type": "json_object"}),
        ("frequency_penalty", 0.5),
        ("audio", {"voice": "a"}),
        ("modalities", ["text", "audio"]),
        ("reasoning_effort", "high"),
        ("temprature", 0),
        ("top_k", 5),
        ("temperature", "hot"),
        ("temperature", 1e-9),
        ("top_p", 1.5),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("seed", 1.5),
        ("stop", ["a"] * 5),
        ("stop", ""),
        ("stream", "yes"),
        ("model", 5),
        ("messages", {}),
    ],
)
def test_a_field_that_is_not_done_is_named(client, field, value):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, extra_body={field: value})
    assert caught.value.param == field and field in caught.value.message
    assert caught.value.type == "invalid_request_error"


def test_mistakes_have_openais_errors(client):
    for model in ("fakee", "../fake"):
        with pytest.raises(openai.NotFoundError) as missing:
            ask(client, model=model)
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")
    with pytest.raises(openai.BadRequestError, match="does not take") as refused:
        ask(client, says(REFUSE))
    assert refused.value.param == "messages"
    with pytest.raises(openai.BadRequestError) as wrong:
        ask(client, says("a"), {"role": "user", "content": [{"type": "text", "text": 5}]})
    assert wrong.value.param == "messages[1].content[0].text"


def test_a_fault_of_the_model_is_a_500_also_in_a_stream(client, caplog):
    with pytest.raises(openai.InternalServerError, match="log says more"):
        ask(client, says(FAIL))
    with pytest.raises(openai.APIError, match="log says more"):
        list(ask(client, says(FAIL), stream=True))
    assert [record.exc_info[0] for record in caplog.records] == [RuntimeError, RuntimeError]


def test_models_are_listed_with_what_they_are(client):
    assert [model.id for model in client.models.list()] == ["fake", "runs/slow"]
    model = client.models.retrieve("runs/slow")
    assert (model.owned_by, model.visual_tokens_per_image) == ("vlbench", VISUAL_TOKENS)
    assert (model.connector, model.image_size, model.most_views_per_image) == ("object", 28, 1)


@pytest.mark.parametrize("is_first_token_there", [True, False])
def test_a_client_that_leaves_frees_its_place(client, is_first_token_there):
    running = ask(client, says("forever"), model="runs/slow", stream=True)
    next(iter(running))
    if is_first_token_there:
        running.close()
    else:  # a second one waits for the only row, and gives up
        with pytest.raises(openai.APITimeoutError):
            ask(client, says("me too"), model="runs/slow", timeout=0.1)
        wait_for(lambda: len(SLOW.ends) and SLOW.ends[-1].completion_tokens == 0)
        running.close()
    assert SLOW.wait_until_idle()
    assert SLOW.ends[-1].finish_reason == "cancelled"


def wait_for(condition: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_beyond_the_queue_a_client_is_told_to_come_back(client):
    streams = [ask(client, says("forever"), model="runs/slow", stream=True) for _ in range(2)]
    with pytest.raises(openai.RateLimitError) as caught:
        ask(client, model="runs/slow")
    assert caught.value.response.headers["retry-after"] == "2"
    text = client.get("/../metrics", cast_to=str)
    assert 'vlbench_requests_running{model="runs/slow"} 1' in text
    assert 'vlbench_requests_waiting{model="runs/slow"} 1' in text
    for stream in streams:
        stream.close()
    assert SLOW.wait_until_idle()


def test_what_was_answered_is_counted():
    with running_server([fake_model("a b")]) as (_, port):
        client = client_of(port)
        for stream in (False, True):
            list(ask(client, says("x y z", Image.new("RGB", (4, 4))), model="a b", stream=stream))
        with pytest.raises(openai.NotFoundError):
            ask(client)
        text = client.get("/../metrics", cast_to=str)
    for line in (
        'responses_total{status="200"} 2',
        'responses_total{status="404"} 1',
        'answers_total{model="a b",reason="stop"} 2',
        'tokens_total{model="a b",kind="completion"} 6',
        f'tokens_total{{model="a b",kind="visual"}} {2 * VISUAL_TOKENS}',
        'time_to_first_token_seconds_bucket{model="a b",le="+Inf"} 2',
        'answer_seconds_count{model="a b"} 2',
    ):
        assert f"\nvlbench_{line}\n" in f"\n{text}"


@pytest.mark.parametrize("limit", [{"max_held_bytes": 50}, {"max_arriving": 0}])
def test_a_server_that_holds_enough_tells_clients_to_come_back(limit):
    engine = FakeEngine()
    with running_server([fake_model("fake", engine)], ApiSettings(**limit)) as (_, port):
        for _ in range(2):
            with pytest.raises(openai.RateLimitError) as caught:
                ask(client_of(port))
            assert caught.value.code == "queue_full"
    assert not engine.requests


def test_thirty_two_clients_at_once_have_their_own_answers(client):
    async def ask_all() -> list[str]:
        async with client_of(client.base_url.port, kind=openai.AsyncOpenAI) as many:
            asked = [
                many.chat.completions.create(model="fake", messages=[says(f"{n} and {n}")])
                for n in range(32)
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]

    assert asyncio.run(ask_all()) == [f"{n} and {n}" for n in range(32)]


def test_the_key_is_asked_for_on_every_address_but_health():
    settings = ApiSettings(api_key="right-key")
    with running_server([fake_model()], settings) as (_, port):
        assert ask(client_of(port, "right-key")).choices[0].message.content == "a b c"
        for key in ("wrong", "right-ke", "right-key2", "Right-key"):
            with pytest.raises(openai.AuthenticationError) as caught:
                client_of(port, key).models.list()
            assert caught.value.code == "invalid_api_key"
        assert client_of(port, "x").get("/../health", cast_to=str)


def test_a_server_that_is_stopped_ends_its_answers_first():
    engine = FakeEngine(delay=0.01)
    with running_server([fake_model("fake", engine)]) as (server, port):
        client = client_of(port)
        running = iter(ask(client, says("forever"), stream=True, max_tokens=40))
        next(running)
        server.begin_drain()
        with pytest.raises(openai.InternalServerError) as caught:
            ask(client_of(port))
        assert caught.value.status_code == 503 and "retry-after" in caught.value.response.headers
        assert list(running)[-1].choices[0].finish_reason == "length"
        wait_for(lambda: server.should_exit)
        assert server.exit_code == 0


def test_a_second_signal_ends_at_once():
    with running_server([fake_model("fake", FakeEngine(delay=0.01))]) as (server, port):
        running = iter(ask(client_of(port), says("forever"), stream=True))
        next(running)
        server.handle_exit(15, None)
        assert not server.should_exit
        server.handle_exit(15, None)
        # some clients pass on what their HTTP library raises for a stream that breaks
        with pytest.raises(Exception) as caught:  # noqa: B017
            list(running)
        assert type(caught.value).__module__.split(".")[0] in {"openai", "httpx", "httpx2"}
    assert server.exit_code == 130
