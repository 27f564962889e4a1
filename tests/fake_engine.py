"""An engine without a model, for tests of the API: it says the question's words, one at a time."""

from __future__ import annotations

import itertools
import threading
import time
from types import SimpleNamespace
from typing import Any

from vlbench.errors import UserError
from vlbench.processor import sample_from_messages
from vlbench.serve.answer_request import (
    AnswerEnd,
    AnswerRequest,
    EndCallback,
    EngineClosing,
    QueueFull,
    TextCallback,
)
from vlbench.serve.api.served_model import ServedModel

VISUAL_TOKENS = 9
FAIL = "fail"  # a question that ends with an error of the engine
REFUSE = "refuse"  # one that the engine does not take


class FakeEngine:
    """Answers with the last question, and repeats it to `max_new_tokens` words after "forever"."""

    def __init__(self, max_rows: int = 4, max_waiting: int = 64, delay: float = 0.0) -> None:
        self.max_rows, self.max_waiting, self.delay = max_rows, max_waiting, delay
        self.requests: list[AnswerRequest] = []
        self.ends: list[AnswerEnd | Exception] = []
        self._changed = threading.Condition()
        self._running = self._unfinished = 0
        self._is_draining = self._is_closed = False

    def submit(self, request: AnswerRequest, on_text: TextCallback, on_end: EndCallback) -> Any:
        images = sample_from_messages(request.messages).images  # refuses what a model would
        question = request.messages[-1]["content"]
        text = question if isinstance(question, str) else question[-1].get("text", "")
        if text == REFUSE:
            raise UserError("the engine does not take this")
        with self._changed:
            if self._is_draining:
                raise EngineClosing("draining")
            if self._unfinished - self._running >= self.max_waiting:
                raise QueueFull("full")
            self._unfinished += 1
        self.requests.append(request)
        handle = SimpleNamespace(is_cancelled=False)

        def cancel() -> None:
            with self._changed:
                handle.is_cancelled = True
                self._changed.notify_all()

        handle.cancel = cancel
        words = text.split(" ")
        pieces = itertools.cycle(words) if words[0] == "forever" else iter(words)
        told = (request, list(itertools.islice(pieces, request.max_new_tokens)), len(images))
        threading.Thread(
            target=self._answer, args=(*told, handle, on_text, on_end), daemon=True
        ).start()
        return handle

    def _answer(
        self,
        request: AnswerRequest,
        words: list[str],
        image_count: int,
        handle: Any,
        on_text: TextCallback,
        on_end: EndCallback,
    ) -> None:
        began = time.monotonic()
        with self._changed:
            self._changed.wait_for(
                lambda: self._running < self.max_rows or handle.is_cancelled or self._is_closed
            )
            self._running += 1
        said = 0
        while said < len(words) and not handle.is_cancelled and not self._is_closed:
            on_text(words[said] if said == 0 else f" {words[said]}")
            said += 1
            time.sleep(self.delay)
        reason = "cancelled" if handle.is_cancelled else "length"
        reason = "stop" if reason == "length" and said < request.max_new_tokens else reason
        visual = image_count * VISUAL_TOKENS
        first = time.monotonic() - began if said else None
        seconds = time.monotonic() - began
        end = AnswerEnd(reason, 10 + visual, visual, image_count, 3, said, first, seconds)
        failed = RuntimeError("a fault of the model") if words[0] == FAIL else None
        with self._changed:
            self._running -= 1
            self._unfinished -= 1
            self._changed.notify_all()
        outcome = EngineClosing("closed") if self._is_closed else failed or end
        self.ends.append(outcome)
        on_end(outcome)

    def drain(self, timeout: float | None = None) -> bool:
        with self._changed:
            self._is_draining = True
            return self._changed.wait_for(lambda: not self._unfinished, timeout)

    def close(self) -> None:
        with self._changed:
            self._is_draining = self._is_closed = True
            self._changed.notify_all()

    def counts(self) -> Any:
        with self._changed:
            waiting = self._unfinished - self._running
            return SimpleNamespace(rows_running=self._running, requests_waiting=waiting)

    def wait_until_idle(self, seconds: float = 10.0) -> bool:
        """Return whether no request is left, at latest after so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._unfinished, seconds)


def fake_model(name: str = "fake", engine: FakeEngine | None = None) -> ServedModel:
    """Return a served model whose engine is fake, and whose facts are made up."""
    processor = SimpleNamespace(
        transform=SimpleNamespace(crop=28),
        tokens_per_image=VISUAL_TOKENS,
        max_positions=512,
        view_settings=None,
    )
    vlm: Any = SimpleNamespace(processor=processor, connector=object(), device="cpu")
    return ServedModel(name, vlm, engine or FakeEngine(), created=1)
