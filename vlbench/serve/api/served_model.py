"""A model behind the API: its name, its engine, and what clients are told of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Protocol

from vlbench.errors import UserError
from vlbench.serve.answer_request import AnswerRequest, EndCallback, TextCallback

if TYPE_CHECKING:
    from vlbench.model.loaded_vlm import LoadedVLM


class EngineCounts(Protocol):
    """What an engine does at a moment, as far as the API tells it."""

    @property
    def rows_running(self) -> int:
        """Answers that are decoded."""

    @property
    def requests_waiting(self) -> int:
        """Accepted requests without a token."""


class AnswerHandle(Protocol):
    """A request that an engine has accepted."""

    def cancel(self) -> None:
        """End the answer; without effect where it has ended."""


class AnswerEngine(Protocol):
    """What answers requests, several at once, in a thread of its own."""

    def submit(
        self, request: AnswerRequest, on_text: TextCallback, on_end: EndCallback
    ) -> AnswerHandle:
        """Accept a request, or raise QueueFull, EngineClosing or UserError; takes milliseconds.

        `on_text` is called with each new piece of the answer and `on_end` once, in other threads.
        """

    def drain(self, timeout: float) -> bool:
        """Accept nothing more and wait for what was accepted, at most `timeout` seconds."""

    def close(self) -> None:
        """End at once, answers too."""

    def counts(self) -> EngineCounts:
        """Return what it does at this moment."""


@dataclass(frozen=True)
class ServedModel:
    """A model that the API answers with."""

    name: str
    """What clients call it, the `id` of /v1/models."""
    vlm: LoadedVLM
    engine: AnswerEngine
    created: int
    """When it was loaded, seconds since 1970."""

    def describe(self) -> dict[str, Any]:
        """Return the object of /v1/models: OpenAI's fields, and what vlbench knows."""
        transform, views = self.vlm.processor.transform, self.vlm.processor.view_settings
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "vlbench",
            "connector": type(self.vlm.connector).__name__,
            # of each of its views, where it is tiled
            "visual_tokens_per_image": self.vlm.processor.tokens_per_image,
            "most_views_per_image": 1 if views is None else views.most_views,
            "image_size": transform.crop,
            "max_model_len": self.vlm.processor.max_positions,
        }


def choose_model_names(paths: Sequence[str]) -> list[str]:
    """Return a name for each model: the last part of its path, and more where that is not unique.

    `.` and `..` are the folders that they stand for. Raises a UserError for a path that is given
    twice, however it is written.
    """
    parts = [PurePath(os.path.abspath(path)).parts for path in paths]
    names = []
    for path, one in zip(paths, parts, strict=True):
        endings = [one[-count:] for count in range(1, len(one) + 1)]
        unique = (end for end in endings if sum(other[-len(end) :] == end for other in parts) == 1)
        ending = next(unique, None)
        if ending is None:
            raise UserError(f"model names {path} twice; a model is served once")
        names.append("/".join(part.strip("/") for part in ending))
    return names
