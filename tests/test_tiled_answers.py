"""Questions about tiled images are answered by evaluation, chat and API as one by one."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest
import torch
from api_server import running_server
from asked_conversations import TILED, ask, build_asked_vlm, noise
from test_tiled_generation import names

from vlbench.evaluate.batch_inference import answer_batch, answer_questions, max_answer_tokens
from vlbench.evaluate.heldout_questions import EvalQuestion
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.processor import sample_from_messages
from vlbench.serve.api.served_model import ServedModel
from vlbench.serve.generation_engine import GenerationEngine

IMAGES = ((0,), (1, 2), (), (3,), (2, 1))
"""Of each question, by their seeds: of one view and of several."""


def build(name: str) -> LoadedVLM:
    """Return a tiled model in float64, so that batches of any length answer alike."""
    return build_asked_vlm(f"tiled {name}").to(torch.float64)


def make_questions() -> list[EvalQuestion]:
    chats = [[ask("what " * (1 + n), *images)] for n, images in enumerate(IMAGES)]
    return [EvalQuestion(sample_from_messages(chat), "it is", "", "en") for chat in chats]


@pytest.mark.parametrize("name", names("llava_mlp", *TILED))
def test_an_evaluation_answers_each_question_as_it_is_answered_alone(name):
    vlm, questions = build(name), make_questions()
    answers = answer_questions(vlm, questions, "test")
    most = max_answer_tokens(vlm, ["it is"])
    alone = [answer_batch(vlm, [one.sample], max_new_tokens=most)[0] for one in questions]
    assert answers == alone and len(set(answers)) > 1
    chats = [vlm.chat([ask("what " * (1 + n), *one)], most) for n, one in enumerate(IMAGES)]
    assert answers == chats


@pytest.fixture(scope="module")
def vlm() -> LoadedVLM:
    return build("llava_mlp")


@pytest.fixture(scope="module")
def client(vlm: LoadedVLM) -> Iterator[openai.OpenAI]:
    """A client of a server with a tiled model, and with one that takes two views."""
    settings = replace(vlm.processor.view_settings, max_views=2)
    few = LoadedVLM(vlm.model, replace(vlm.processor, view_settings=settings))
    models = [
        ServedModel(name, one, GenerationEngine(one), created=1)
        for name, one in (("tiled", vlm), ("few", few))
    ]
    with running_server(models) as (_, port):
        yield openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60
        )


def as_urls(*images: int) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = []
    for seed in images:
        file = io.BytesIO()
        noise(seed).open().save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": [*content, {"type": "text", "text": "what is it?"}]}]


def test_the_api_answers_as_chat_does_and_tells_the_views(client, vlm):
    for images in ((0,), (1, 2, 0)):
        chat = [ask("what is it?", *images)]
        answer = client.chat.completions.create(
            model="tiled", messages=as_urls(*images), max_tokens=5, temperature=0
        )
        assert answer.choices[0].message.content == vlm.chat(chat, 5)
        batch = vlm.prepare(chat)
        assert answer.usage.prompt_tokens_details.views == len(batch.pixels)
        assert answer.usage.prompt_tokens == len(batch.input_ids[0])
    described = client.models.retrieve("tiled")
    assert described.most_views_per_image == vlm.processor.view_settings.most_views


def test_the_api_refuses_more_views_than_the_model_takes_by_name(client):
    with pytest.raises(openai.BadRequestError, match=r"has \d+ views.*tiling.max_views is 2"):
        client.chat.completions.create(model="few", messages=as_urls(0, 1), max_tokens=5)
