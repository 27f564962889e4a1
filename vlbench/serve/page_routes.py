"""What the web page asks for beside the API: what is known of models, votes and heat maps."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from vlbench.data.image_processing import mean_colour
from vlbench.errors import EnvironmentFailure, UserError
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.train_flops import count_forward_flops
from vlbench.serve.api.access_checks import SAFE_METHODS
from vlbench.serve.api.api_errors import CLIENT_LEFT, ApiError
from vlbench.serve.api.api_state import ApiState, api_state
from vlbench.serve.api.chat_messages import build_messages
from vlbench.serve.api.request_body import parse_json_object, read_fields
from vlbench.serve.api.served_model import ServedModel
from vlbench.serve.heat_map import HeatMap, compute_heat_map
from vlbench.serve.vote_file import MAX_TEXT, Vote, VoteFile
from vlbench.system_errors import is_memory_error

MAX_WAITING_MAPS = 8  # requests for heat maps that wait for the one that is computed
router = APIRouter(prefix="/page")


class HeatMapFields(BaseModel):
    """A question about an answer: which patches of picture number `image` does it depend on?"""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    messages: list[Any] = Field(min_length=1)
    """The conversation up to the question, as the API takes it."""
    answer: str = Field(min_length=1, max_length=MAX_TEXT)
    image: int = 0


class PageState:
    """What the routes of the page share: votes, the queue of heat maps, facts about models."""

    def __init__(self, models: Mapping[str, ServedModel], votes: VoteFile | None) -> None:
        """Take the served models, and where votes are kept; None: there is no vote."""
        self.votes = votes
        self.heat_maps = HeatMapQueue()
        self._models = models
        self._facts: dict[str, Any] = {}
        self._lock = threading.Lock()

    def model_facts(self) -> dict[str, Any]:
        """Return by name what `describe_for_page` knows of each model; counted once."""
        with self._lock:
            for name, model in self._models.items():
                if name not in self._facts:
                    self._facts[name] = describe_for_page(model.vlm)
            return self._facts


class HeatMapQueue:
    """Computes heat maps in a worker thread, one at a time, in the order in which they came."""

    def __init__(self) -> None:
        """Begin with none."""
        self._one_at_a_time = asyncio.Lock()
        self._waiting_count = 0

    async def run(self, compute: Callable[[], HeatMap]) -> HeatMap:
        """Return what `compute` returns; ApiError 429 where too many wait."""
        if self._waiting_count > MAX_WAITING_MAPS:
            raise ApiError(429, "as many heat maps are asked for as may be", code="queue_full")
        self._waiting_count += 1
        try:
            async with self._one_at_a_time:
                return await to_thread.run_sync(compute)
        finally:
            self._waiting_count -= 1


def describe_for_page(vlm: LoadedVLM) -> dict[str, Any]:
    """Return what the page has to know of a model beside what /v1/models says.

    - `blank_colour`: of the blank picture, the one that evaluations ask with
    - `flops`: floating-point operations of a forward pass for each `position`, each
      `attended_pair` of positions, each `answer_token` and each `image`
    """
    flops = count_forward_flops(vlm.model)
    return {
        "blank_colour": mean_colour(vlm.processor.transform.mean),
        "flops": {
            "position": flops.per_position,
            "attended_pair": flops.per_attended_pair,
            "answer_token": flops.per_supervised_position,
            "view": flops.per_view,
        },
    }


@router.api_route("/config", methods=[*SAFE_METHODS])
async def show_config(request: Request) -> dict[str, Any]:
    """Return what is known of each model, and whether votes are kept."""
    page = _page_state(request)
    facts = await to_thread.run_sync(page.model_facts)
    return {"models": facts, "votes": page.votes is not None}


@router.post("/votes")
async def add_vote(request: Request) -> Response:
    """Write a vote into the file `votes=`."""
    votes = _page_state(request).votes
    if votes is None:
        raise ApiError(404, "no votes are kept: the server was started without votes=FILE")
    async with _read_body(request) as body:
        await to_thread.run_sync(_write_vote, votes, body)
    return Response(status_code=204)


@router.post("/heat_map")
async def show_heat_map(request: Request) -> dict[str, Any]:
    """Return the `rows` of patches that an answer depends on, and the `box` that they cover."""
    queue = _page_state(request).heat_maps
    async with _read_body(request) as body:
        heat_map = await queue.run(partial(_compute_map, api_state(request), body))
    return heat_map._asdict()


def _page_state(request: Request) -> PageState:
    state = request.app.state.page
    assert isinstance(state, PageState)
    return state


@contextlib.asynccontextmanager
async def _read_body(request: Request) -> AsyncIterator[bytes]:
    """Give the body of a request, which counts among those that the server holds until the end."""
    state = api_state(request)
    with state.body_budget.hold_bytes() as body:
        with state.admit_request():
            try:
                await body.read_body(request, state.settings)
            except ClientDisconnect:
                raise ApiError(CLIENT_LEFT, "the client has left") from None
        yield bytes(body.data)


def _write_vote(votes: VoteFile, body: bytes) -> None:
    try:
        votes.add_vote(read_fields(Vote, parse_json_object(body)))
    except EnvironmentFailure as error:
        raise ApiError(507, str(error)) from error
    except UserError as error:
        raise ApiError(400, str(error)) from error


def _compute_map(state: ApiState, body: bytes) -> HeatMap:
    fields = read_fields(HeatMapFields, parse_json_object(body))
    vlm = state.find_model(fields.model).vlm
    messages = build_messages(fields.messages, state.request_images())
    try:
        return compute_heat_map(vlm, messages, fields.answer, fields.image)
    except UserError as error:
        raise ApiError(400, str(error)) from error
    except Exception as error:
        if not is_memory_error(error):
            raise
        raise ApiError(503, "there is not enough memory for a heat map") from error
