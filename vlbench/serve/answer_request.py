"""What an answer is asked with, and what is known when it ends: between the API and the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from vlbench.processor import ChatMessage

FinishReason = Literal["stop", "length", "cancelled"]
"""Why an answer ended: it was complete or met a stop text, it had all its tokens, or its client
had left."""


@dataclass(frozen=True)
class AnswerRequest:
    """One question to a model, with the options of its answer."""

    messages: list[ChatMessage]
    """The conversation in the chat-message format; images are PIL images."""
    max_new_tokens: int = 512
    temperature: float = 0.0
    """0 for the likeliest token; otherwise one is drawn."""
    top_p: float = 1.0
    seed: int = 0
    """Of this answer's own random generator: an answer does not depend on what runs beside it."""
    stop: tuple[str, ...] = ()
    """Texts at which the answer ends; they are not part of it."""


@dataclass(frozen=True)
class AnswerEnd:
    """How an answer ended, and what it took."""

    finish_reason: FinishReason
    prompt_tokens: int
    """Positions of the prompt, visual tokens included."""
    visual_tokens: int
    """Image positions of the prompt."""
    views: int
    """Views of the prompt's images, squares that the vision encoder sees: an image has one unless
    it is tiled."""
    cached_tokens: int
    """Positions of the prompt whose keys and values were known from an earlier request."""
    completion_tokens: int
    seconds_to_first_token: float | None
    """From the request's arrival; None where no token was generated."""
    seconds: float
    """From the request's arrival to its end."""


TextCallback = Callable[[str], None]
"""Called with each new piece of an answer."""
EndCallback = Callable[[AnswerEnd | Exception], None]
"""Called once, with how an answer ended or with the error that ended it."""


class QueueFull(Exception):
    """As many requests wait as may; the client is told to come back."""


class EngineClosing(Exception):
    """The engine ends what it has accepted, and accepts nothing more."""
