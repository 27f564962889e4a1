"""An answer as server-sent events: the role, pieces of the text, why it ended, `[DONE]`."""

from __future__ import annotations

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vlbench.serve.answer_request import AnswerEnd
from vlbench.serve.api.answer_channel import AnswerChannel, AnswerEvent, cancel_when_gone
from vlbench.serve.api.api_errors import ApiError
from vlbench.serve.api.api_state import ApiState
from vlbench.serve.api.chat_responses import CompletionHead, event_bytes
from vlbench.serve.api.served_model import AnswerHandle, ServedModel

KEEP_ALIVE_SECONDS = 15.0  # without text a comment is sent, so that no proxy takes it for dead
KEEP_ALIVE = b": the answer goes on\n\n"
STREAM_END = b"data: [DONE]\n\n"


class AnswerStream(Response):
    """The response that sends an answer while it is generated.

    The answer is cancelled when its client leaves.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        state: ApiState,
        model: ServedModel,
        channel: AnswerChannel,
        handle: AnswerHandle,
        head: CompletionHead,
        includes_usage: bool,
    ) -> None:
        """Take what is sent, and where it comes from.

        Args:
            state: Of the server.
            model: What answers.
            channel: The events of the answer.
            handle: Cancels it.
            head: What its chunks have in common.
            includes_usage: Whether a last chunk tells the numbers of tokens.
        """
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._state, self._model, self._channel, self._handle = state, model, channel, handle
        self._head, self._includes_usage = head, includes_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with cancel_when_gone(receive, self._handle):
            await send(start)
            await self._send_pieces(send)

    async def _send_pieces(self, send: Send) -> None:
        has_usage = self._includes_usage
        role = {"role": "assistant", "content": "", "refusal": None}
        await _send_body(send, event_bytes(self._head.text_chunk(role, has_usage=has_usage)))
        while not isinstance(event := await self._next_event(), AnswerEnd | Exception):
            chunk = self._head.text_chunk({"content": event}, has_usage=has_usage)
            await _send_body(send, event_bytes(chunk) if event else KEEP_ALIVE)
        try:
            body = self._end_bytes(self._state.count_end(self._model, event))
        except ApiError as error:  # the status is sent: the error is an event
            body = event_bytes(error.to_json())
        await _send_body(send, body + STREAM_END, is_last=True)

    async def _next_event(self) -> AnswerEvent:
        """Return the next event; an empty text where nothing has come for a while."""
        return await self._channel.next_event(KEEP_ALIVE_SECONDS) or ""

    def _end_bytes(self, end: AnswerEnd) -> bytes:
        """Return why the answer ended, and its numbers of tokens where they were asked for."""
        chunk = self._head.text_chunk({}, end.finish_reason, self._includes_usage)
        usage = event_bytes(self._head.usage_chunk(end)) if self._includes_usage else b""
        return event_bytes(chunk) + usage


async def _send_body(send: Send, body: bytes, is_last: bool = False) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": not is_last})
