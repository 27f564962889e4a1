"""Answers as OpenAI's objects: a whole completion, or the chunks of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlbench.serve.answer_request import AnswerEnd
from vlbench.text_files import format_json
from vlbench.version import __version__


@dataclass(frozen=True)
class CompletionHead:
    """What all objects of one completion have in common."""

    model: str
    seed: int
    """What the answer was drawn with: a field that OpenAI's clients leave alone."""
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion_body(self, text: str, end: AnswerEnd) -> dict[str, Any]:
        """Return the whole answer as one object."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"message": message, "finish_reason": end.finish_reason}
        return {**self._response_body("chat.completion", choice), "usage": usage_of(end)}

    def text_chunk(
        self, delta: Mapping[str, Any], finish_reason: str | None = None, has_usage: bool = False
    ) -> dict[str, Any]:
        """Return a chunk of a stream; where the last one tells tokens, the others say null."""
        choice = {"delta": delta, "finish_reason": finish_reason}
        chunk = self._response_body("chat.completion.chunk", choice)
        return {**chunk, "usage": None} if has_usage else chunk

    def usage_chunk(self, end: AnswerEnd) -> dict[str, Any]:
        """Return the chunk that tells the numbers of tokens, without a choice."""
        return {**self._response_body("chat.completion.chunk"), "usage": usage_of(end)}

    def _response_body(self, kind: str, *choices: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"vlbench-{__version__}",
            "seed": self.seed,
            "choices": [{"index": 0, "logprobs": None, **choice} for choice in choices],
        }


def usage_of(end: AnswerEnd) -> dict[str, Any]:
    """Return OpenAI's numbers of tokens, with visual tokens and views of the prompt's images."""
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.completion_tokens,
        "total_tokens": end.prompt_tokens + end.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": end.cached_tokens,
            "audio_tokens": 0,
            "visual_tokens": end.visual_tokens,
            "views": end.views,
        },
    }


def event_bytes(value: Mapping[str, Any]) -> bytes:
    """Return an object as an event of a stream (server-sent events)."""
    return b"data: " + format_json(value).encode("utf-8") + b"\n\n"
