"""What rests on private parts of uvicorn: a connection's state between requests."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any


class LimitedConnection(asyncio.Protocol):
    """Limits of a connection that uvicorn has not, to stand before its H11Protocol.

    Rests on `H11Protocol.cycle` (None, or the latest request, with `response_started` and
    `response_complete`), on `.connections`, `.transport`, `.loop` and `.send_400_response`; checked
    with uvicorn 0.54. Where they change, connections that send nothing, or send their headers byte
    by byte, are held for ever, and what is no HTTP is answered with text.
    """

    max_connections: int
    header_seconds: float
    stall_seconds: float
    bad_request_body: bytes
    connections: Collection[Any]
    cycle: Any
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    _header_deadline: asyncio.TimerHandle | None = None
    _stall_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for a request; end at once where there are too many connections."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self.transport.abort()
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        """Take bytes, of which the first ones of a request start its deadline."""
        super().data_received(data)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadlines."""
        super().connection_lost(exc)
        self._stop_header_deadline()
        self._stop_stall_deadline()

    def pause_writing(self) -> None:
        """Wait for the client to read what was sent, for a while."""
        super().pause_writing()
        self._stop_stall_deadline()
        self._stall_deadline = self.loop.call_later(self.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on, as the client has read."""
        super().resume_writing()
        self._stop_stall_deadline()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP with the body of an error; uvicorn would send its `msg` as text.

        Behind the beginning of another response nothing is sent: it would be a part of that one.
        """
        if not self._is_busy() or not self.cycle.response_started:
            self.transport.write(
                b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(self.bad_request_body)
            )
            self.transport.write(self.bad_request_body)
        self.transport.close()

    def _watch_headers(self) -> None:
        if self._is_busy():
            self._stop_header_deadline()
        elif self._header_deadline is None:
            self._header_deadline = self.loop.call_later(self.header_seconds, self._end_headers)

    def _end_headers(self) -> None:
        self._header_deadline = None
        if not self._is_busy():
            self.transport.abort()

    def _is_busy(self) -> bool:
        """Return whether a request has arrived and is not answered yet."""
        return self.cycle is not None and not self.cycle.response_complete

    def _stop_header_deadline(self) -> None:
        if self._header_deadline is not None:
            self._header_deadline.cancel()
            self._header_deadline = None

    def _stop_stall_deadline(self) -> None:
        if self._stall_deadline is not None:
            self._stall_deadline.cancel()
            self._stall_deadline = None


def limited_protocol(
    max_connections: int, header_seconds: float, stall_seconds: float, bad_request_body: bytes
) -> type[asyncio.Protocol]:
    """Return uvicorn's protocol of HTTP with the limits of LimitedConnection.

    Args:
        max_connections: One beyond is ended at once: the files that a process may open are few.
        header_seconds: From the connection, or a request's first byte, to the end of its headers.
        stall_seconds: That a client may take to read what was sent, once buffers are full.
        bad_request_body: JSON, sent with status 400 to a client that does not speak HTTP.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    limits = {
        "max_connections": max_connections,
        "header_seconds": header_seconds,
        "stall_seconds": stall_seconds,
        "bad_request_body": bad_request_body,
    }
    return type("LimitedProtocol", (LimitedConnection, H11Protocol), limits)
