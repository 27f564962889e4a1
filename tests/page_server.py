"""A server with the page, for tests: small random models whose engines answer from a script."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from api_server import running_server
from random_vlm import small_vlm

from vlbench.connector import registry
from vlbench.serve.answer_request import (
    AnswerEnd,
    AnswerRequest,
    EndCallback,
    FinishReason,
    QueueFull,
    TextCallback,
)
from vlbench.serve.api.api_settings import ApiSettings
from vlbench.serve.api.served_model import ServedModel
from vlbench.serve.vote_file import VoteFile

PIECE_SECONDS = 0.01
ANSWERS = {"html": "<b id=bold>bold</b><img src=x onerror=alert(1)> & more", "none": ""}
"""What is answered to some questions; "slow" never ends, "full" finds no place in the queue."""


class ScriptedHandle:
    """An answer that is being given, which can be cancelled."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()


class ScriptedEngine:
    """Answers from `ANSWERS`, otherwise with its name, the question's number and the picture."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.requests: list[AnswerRequest] = []

    def submit(
        self, request: AnswerRequest, on_text: TextCallback, on_end: EndCallback
    ) -> ScriptedHandle:
        self.requests.append(request)
        question = last_text(request)
        if question == "full":
            raise QueueFull
        handle = ScriptedHandle()
        arguments = (self.answer_to(request), question == "slow", handle, on_text, on_end)
        threading.Thread(target=self.give, args=arguments, daemon=True).start()
        return handle

    def answer_to(self, request: AnswerRequest) -> str:
        question, images = last_text(request), images_of(request)
        if question == "slow":
            return "one two " * 1000
        # a picture of one colour is blank
        seen = ["blank" if len(image.getcolors() or "..") == 1 else "seen" for image in images]
        turn = 1 + len(request.messages) // 2
        return ANSWERS.get(question, f"I am {self.name}, turn {turn}: {question} {' '.join(seen)}")

    def give(
        self,
        answer: str,
        is_slow: bool,
        handle: ScriptedHandle,
        on_text: TextCallback,
        on_end: EndCallback,
    ) -> None:
        words = [f"{word} " for word in answer.split(" ")] if answer else []
        reason: FinishReason = "stop"
        for word in words:
            time.sleep(PIECE_SECONDS * (3 if is_slow else 1))
            if handle.cancelled.is_set():
                reason = "cancelled"
                break
            on_text(word)
        on_end(AnswerEnd(reason, 40, 16, 1, 0, len(words), 0.01, 0.1))

    def drain(self, timeout: float) -> bool:
        return True

    def close(self) -> None:
        pass

    def counts(self) -> Any:
        return SimpleNamespace(rows_running=0, requests_waiting=0)


def last_text(request: AnswerRequest) -> str:
    content = request.messages[-1]["content"]
    return content if isinstance(content, str) else str(content[-1]["text"])


def images_of(request: AnswerRequest) -> list[Any]:
    contents = [one["content"] for one in request.messages if isinstance(one["content"], list)]
    return [part["image"] for parts in contents for part in parts if part["type"] == "image"]


def scripted_models(connectors: Mapping[str, str]) -> list[ServedModel]:
    """Return a served model for each name, with the connector of that name."""
    return [
        ServedModel(name, small_vlm(registry.load_connector(kind)), ScriptedEngine(name), 0)
        for name, kind in connectors.items()
    ]


@contextlib.contextmanager
def serve_page(
    models: Sequence[ServedModel], votes: Path | None = None, api_key: str | None = None
) -> Iterator[str]:
    """Serve the page in a thread until the end of `with`; give its address."""
    vote_file = VoteFile(votes, [model.name for model in models]) if votes else None
    with running_server(models, ApiSettings(api_key=api_key), votes=vote_file) as (_, port):
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def models():
    return scripted_models({"alpha": "llava_mlp", "beta": "qformer"})


@pytest.fixture(scope="module")
def votes(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("votes") / "votes.jsonl"
