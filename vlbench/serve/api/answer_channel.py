"""An answer on its way: from the engine's thread to the event loop of a request."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.types import Receive

from vlbench.serve.answer_request import AnswerEnd
from vlbench.serve.api.served_model import AnswerHandle

AnswerEvent = str | AnswerEnd | Exception
"""A piece of the text; or the end, after which nothing comes; or what went wrong, likewise."""


class AnswerChannel:
    """The events of one answer. Its callbacks may be called in any thread."""

    def __init__(self) -> None:
        """Belong to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[AnswerEvent] = asyncio.Queue()

    def on_text(self, text: str) -> None:
        """Take a piece of the text."""
        self._put_event(text)

    def on_end(self, end: AnswerEnd | Exception) -> None:
        """Take the end."""
        self._put_event(end)

    async def next_event(self, timeout: float | None = None) -> AnswerEvent | None:
        """Return the next event, None after `timeout` seconds without one."""
        try:
            async with asyncio.timeout(timeout):
                return await self._events.get()
        except TimeoutError:
            return None

    def _put_event(self, event: AnswerEvent) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


async def wait_until_gone(receive: Receive) -> None:
    """Return when the client of a request has left; its body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


@contextlib.asynccontextmanager
async def cancel_when_gone(receive: Receive, handle: AnswerHandle) -> AsyncIterator[None]:
    """Cancel an answer as soon as its client has left, and on leaving in any case."""
    watch = asyncio.create_task(wait_until_gone(receive))
    watch.add_done_callback(lambda _: handle.cancel())
    try:
        yield
    finally:
        watch.cancel()
        handle.cancel()
