"""What a route sees of the server: its models, settings and counts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator, Sequence

from fastapi import Request

from vlbench.errors import EnvironmentFailure, UserError, suggest_name
from vlbench.serve.answer_request import AnswerEnd, EngineClosing
from vlbench.serve.api.api_errors import ApiError
from vlbench.serve.api.api_settings import ApiSettings
from vlbench.serve.api.image_inputs import RequestImages
from vlbench.serve.api.remote_images import RemoteImages
from vlbench.serve.api.request_body import BodyBudget
from vlbench.serve.api.served_model import ServedModel
from vlbench.serve.api.server_metrics import ServerMetrics


class ApiState:
    """The models of a server with its settings, and what is going on. For one event loop."""

    def __init__(
        self, models: Sequence[ServedModel], settings: ApiSettings, remote_images: RemoteImages
    ) -> None:
        """Take the models, of different names, the settings, and what downloads images."""
        self.models = {model.name: model for model in models}
        self.settings = settings
        self.metrics = ServerMetrics()
        self.body_budget = BodyBudget(settings.max_held_bytes)
        self.preparing = asyncio.Semaphore(settings.max_preparing)
        self.is_draining = False
        self._remote_images = remote_images
        self._arriving_count = 0

    def request_images(self) -> RequestImages:
        """Return what opens the images of one request."""
        return RequestImages(self.settings, self._remote_images)

    def find_model(self, name: str) -> ServedModel:
        """Return the model that clients call `name`; ApiError 404 where there is none."""
        if name in self.models:
            return self.models[name]
        known = ", ".join(self.models)
        hint = suggest_name(name, self.models)
        message = f"there is no model '{name:.100}'; served are {known}.{hint}"
        raise ApiError(404, message, code="model_not_found", param="model")

    @contextlib.contextmanager
    def admit_request(self) -> Iterator[None]:
        """Count a request while it arrives; ApiError where the server stops or has too many."""
        if self.is_draining:
            raise draining_error()
        if self._arriving_count >= self.settings.max_arriving:
            raise queue_full_error()
        self._arriving_count += 1
        try:
            yield
        finally:
            self._arriving_count -= 1

    def count_end(self, model: ServedModel, end: AnswerEnd | Exception) -> AnswerEnd:
        """Return the end of an answer, once it is counted; ApiError where it is no end of one."""
        if isinstance(end, AnswerEnd):
            self.metrics.count_answer(model.name, end)
            if end.finish_reason == "cancelled":  # by the server, or nobody reads this
                raise draining_error()
            return end
        self.metrics.count_failure(model.name)
        if isinstance(end, EngineClosing):
            raise draining_error()
        if isinstance(end, UserError | EnvironmentFailure):
            raise ApiError(500, str(end))
        logging.getLogger(__name__).error("an answer has failed", exc_info=end)
        raise ApiError(500, "the answer has failed; the server's log says more")


def api_state(request: Request) -> ApiState:
    """Return the state of the server that has received a request."""
    state = request.app.state.api
    assert isinstance(state, ApiState)
    return state


def draining_error() -> ApiError:
    """Return what is told to new requests once the server has been asked to stop."""
    return ApiError(503, "the server is stopping; it ends what it has accepted", code="draining")


def queue_full_error() -> ApiError:
    """Return what is told to a request that finds no place to wait."""
    return ApiError(429, "as many requests wait as may; try again later", code="queue_full")
