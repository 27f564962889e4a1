"""What the web page of `serve` asks for beside the API: its files, votes and heat maps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fastapi import APIRouter, HTTPException, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from vlbench.data.image_processing import mean_colour
from vlbench.errors import UserError
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.train_flops import count_forward_flops
from vlbench.processor import ChatMessage
from vlbench.serve.heat_map import HeatMap, compute_heat_map
from vlbench.serve.vote_file import MAX_TEXT, Vote, VoteFile
from vlbench.system_errors import explain_unwritable

PAGE_FOLDER = Path(__file__).parent / "page"
MEDIA_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
MAX_WAITING_MAPS = 8  # requests for heat maps that wait for the one that is computed
ReadMessages = Callable[[list[Any]], list[ChatMessage]]


@dataclass(frozen=True)
class PageModel:
    """A model as the page knows it."""

    description: Mapping[str, Any]
    """What `/page/config` says of it: see `describe_page_model`."""
    heat_map: Callable[[list[ChatMessage], str, int], HeatMap]
    """How an answer to a conversation depends on one of its pictures."""


class HeatMapRequest(BaseModel):
    """A question about an answer: which patches of picture number `image` it depends on."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    messages: list[Any]
    """The conversation up to the question, as the API takes it."""
    answer: str = Field(min_length=1, max_length=MAX_TEXT)
    image: int = 0


def describe_page_model(vlm: LoadedVLM) -> PageModel:
    """Return what the page has to know of a model, and how its heat maps are computed.

    - `blank_colour`: of the blank picture, the one that evaluations ask with
    - `flops`: floating-point operations of a forward pass for each `position`, each
      `attended_pair` of positions, each `answer_token` and each `image`
    """
    flops = count_forward_flops(vlm.model)
    description = {
        "blank_colour": mean_colour(vlm.processor.transform.mean),
        "flops": {
            "position": flops.per_position,
            "attended_pair": flops.per_attended_pair,
            "answer_token": flops.per_supervised_position,
            "image": flops.per_image,
        },
    }
    return PageModel(
        description, lambda messages, answer, image: compute_heat_map(vlm, messages, answer, image)
    )


def file_router() -> APIRouter:
    """Return the routes of the page's files, which hold nothing that is secret."""
    router = APIRouter(include_in_schema=False)
    index = (PAGE_FOLDER / "index.html").read_bytes()
    files = {
        path.name: (path.read_bytes(), MEDIA_TYPES[path.suffix])
        for path in PAGE_FOLDER.iterdir()
        if path.suffix in MEDIA_TYPES
    }

    @router.get("/")
    def get_page() -> Response:
        return Response(index, media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)

    @router.get("/page/files/{name}")
    def get_file(name: str) -> Response:
        if name not in files:
            raise HTTPException(404, f"the page has no file {name:.100}")
        content, media_type = files[name]
        return Response(content, media_type=media_type, headers=PAGE_HEADERS)

    return router


def page_router(
    models: Mapping[str, PageModel], read_messages: ReadMessages, votes: VoteFile | None
) -> APIRouter:
    """Return the routes that the page asks; where there is a key, they are behind it.

    Args:
        models: The served models by name.
        read_messages: What turns the API's messages into chat messages; a UserError if they are
            wrong.
        votes: Where votes are kept; None: there is no vote.
    """
    router = APIRouter(prefix="/page", include_in_schema=False)
    map_queue = HeatMapQueue()

    @router.get("/config")
    def get_config() -> dict[str, Any]:
        described = {name: model.description for name, model in models.items()}
        return {"models": described, "votes": votes is not None}

    @router.post("/votes", status_code=204)
    def post_vote(vote: Vote) -> None:
        if votes is None:
            raise HTTPException(404, "votes are not kept: the server was started without votes=FILE")
        try:
            votes.add_vote(vote)
        except UserError as error:
            raise HTTPException(400, str(error)) from error
        except OSError as error:
            reason = explain_unwritable(error, f"votes={votes.path}")
            raise HTTPException(507, str(reason)) from error

    @router.post("/heat_map")
    async def post_heat_map(request: HeatMapRequest) -> dict[str, Any]:
        if request.model not in models:
            raise HTTPException(404, f"there is no model '{request.model:.100}' here")
        compute = models[request.model].heat_map

        def read_and_compute() -> HeatMap:
            return compute(read_messages(request.messages), request.answer, request.image)

        return (await map_queue.run(read_and_compute))._asdict()

    return router


class HeatMapQueue:
    """Computes heat maps in a worker thread, one at a time, in the order in which they came."""

    def __init__(self) -> None:
        """Begin with none."""
        self._one_at_a_time = asyncio.Lock()
        self._waiting = 0

    async def run(self, compute: Callable[[], HeatMap]) -> HeatMap:
        """Return what `compute` returns; an HTTPException says what went wrong."""
        if self._waiting >= MAX_WAITING_MAPS:
            raise HTTPException(429, "other heat maps are being computed", {"Retry-After": "5"})
        self._waiting += 1
        try:
            async with self._one_at_a_time:
                return await run_in_threadpool(compute)
        except UserError as error:
            raise HTTPException(400, str(error)) from error
        except torch.OutOfMemoryError as error:
            raise HTTPException(503, "there is not enough memory for a heat map") from error
        finally:
            self._waiting -= 1
