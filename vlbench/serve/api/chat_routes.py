"""POST /v1/chat/completions: a question to a model, answered whole or as a stream."""

from __future__ import annotations

from typing import NamedTuple

from anyio import to_thread
from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from vlbench.errors import UserError
from vlbench.processor import ConversationTooLong
from vlbench.serve.answer_request import AnswerEnd, AnswerRequest, EngineClosing, QueueFull
from vlbench.serve.api.answer_channel import AnswerChannel, cancel_when_gone
from vlbench.serve.api.answer_stream import AnswerStream
from vlbench.serve.api.api_errors import CLIENT_LEFT, ApiError
from vlbench.serve.api.api_state import (
    ApiState,
    api_state,
    draining_error,
    queue_full_error,
)
from vlbench.serve.api.chat_fields import ChatFields, read_chat_fields
from vlbench.serve.api.chat_messages import build_messages
from vlbench.serve.api.chat_responses import CompletionHead
from vlbench.serve.api.request_body import parse_json_object
from vlbench.serve.api.served_model import AnswerHandle, ServedModel

router = APIRouter()


class SubmittedAnswer(NamedTuple):
    """A request that an engine has accepted."""

    fields: ChatFields
    model: ServedModel
    handle: AnswerHandle
    head: CompletionHead


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, as OpenAI's endpoint of this name."""
    state, channel = api_state(request), AnswerChannel()
    try:
        submitted = await _read_and_submit(request, state, channel)
    except ClientDisconnect:
        return Response(status_code=CLIENT_LEFT)
    fields, model, handle, head = submitted
    if fields.stream:
        return AnswerStream(state, model, channel, handle, head, fields.includes_usage)
    return await _whole_answer(request, state, channel, submitted)


async def _read_and_submit(
    request: Request, state: ApiState, channel: AnswerChannel
) -> SubmittedAnswer:
    """Read a request within the limits, and hand it to its model's engine."""
    with state.admit_request(), state.body_budget.hold_bytes() as body:
        await body.read_body(request, state.settings)
        async with state.preparing:
            return await to_thread.run_sync(submit_answer, state, body.data, channel)


def submit_answer(state: ApiState, body: bytearray, channel: AnswerChannel) -> SubmittedAnswer:
    """Hand a request to its model's engine; takes as long as its images do, so not on the loop.

    Raises ApiError for what is wrong with it, and where no place is free.
    """
    fields = read_chat_fields(parse_json_object(body))
    model = state.find_model(fields.model)
    seed = fields.chosen_seed()
    request = AnswerRequest(
        messages=build_messages(fields.messages, state.request_images()),
        max_new_tokens=fields.answer_tokens,
        temperature=fields.temperature or 0.0,
        top_p=1.0 if fields.top_p is None else fields.top_p,
        seed=seed,
        stop=fields.stop_texts(),
    )
    try:
        handle = model.engine.submit(request, channel.on_text, channel.on_end)
    except QueueFull:
        raise queue_full_error() from None
    except EngineClosing:
        raise draining_error() from None
    except ConversationTooLong as error:
        raise ApiError(400, str(error), code="context_length_exceeded", param="messages") from None
    except UserError as error:
        raise ApiError(400, str(error), param="messages") from None
    return SubmittedAnswer(fields, model, handle, CompletionHead(model.name, seed))


async def _whole_answer(
    request: Request, state: ApiState, channel: AnswerChannel, submitted: SubmittedAnswer
) -> Response:
    pieces: list[str] = []
    async with cancel_when_gone(request.receive, submitted.handle):
        while not isinstance(event := await channel.next_event(), AnswerEnd | Exception):
            pieces.append(event or "")
    end = state.count_end(submitted.model, event)
    return JSONResponse(submitted.head.completion_body("".join(pieces), end))
