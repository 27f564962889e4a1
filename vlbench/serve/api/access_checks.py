"""What every request passes before a route sees it: Host, Origin, key; and headers of responses.

A page of any site may send requests to a server on loopback. The Host header stops one whose name
was pointed at this machine (DNS rebinding), the Origin header one that posts across sites; nothing
allows other sites to read a response (CORS).
"""

from __future__ import annotations

import hmac
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlbench.serve.api.api_errors import ApiError
from vlbench.serve.api.api_settings import LOOPBACK_NAMES
from vlbench.serve.api.api_state import ApiState

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
"""Of every response, unless its route has set another value."""
SAFE_METHODS = ("GET", "HEAD")
SINGLE_HEADERS = ("content-encoding", "content-type", "expect", "origin")
"""Headers of which two could say different things to a proxy and to this server."""


class AccessChecks:
    """The ASGI middleware that refuses requests, and sets headers of all responses."""

    def __init__(self, app: ASGIApp, state: ApiState, open_paths: Collection[str]) -> None:
        """Stand before `app`; the addresses `open_paths` are answered without the key."""
        self._app, self._state, self._open_paths = app, state, frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._state.metrics.count_response(message["status"])
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check_request(scope)
        except ApiError as error:
            return await error.to_response()(scope, receive, send_with_headers)
        await self._app(scope, receive, send_with_headers)

    def _check_request(self, scope: Scope) -> None:
        headers, settings = Headers(scope=scope), self._state.settings
        _check_length(scope, settings.max_header_bytes)
        _check_framing(scope, headers)
        host = headers.get("host", "")
        allowed = (
            {*LOOPBACK_NAMES, settings.url_host, *settings.allowed_hosts}
            if settings.is_loopback
            else None
        )
        if len(headers.getlist("host")) != 1 or (allowed and _without_port(host) not in allowed):
            message = (
                f"the Host header is '{host:.100}', by which this server is not reached; it "
                "listens on this machine alone (allow_hosts= names others, as of a proxy)"
            )
            raise ApiError(403, message, code="host_not_allowed")
        origin = headers.get("origin")
        if scope["method"] not in SAFE_METHODS and origin is not None:
            self._check_origin(origin, host)
        if settings.api_key is not None and scope["path"] not in self._open_paths:
            _check_key(headers.getlist("authorization"), settings.api_key)

    def _check_origin(self, origin: str, host: str) -> None:
        """Raise an ApiError for a request that a page of another site has sent."""
        try:
            parts = urlsplit(origin)
            name, netloc = parts.hostname or "", parts.netloc
        except ValueError:
            name = netloc = ""
        is_same = origin.startswith(("http://", "https://")) and netloc.lower() == host.lower()
        if not is_same and name not in self._state.settings.allowed_hosts:
            message = f"a page of '{origin:.100}' may not use this server"
            raise ApiError(403, message, code="origin_not_allowed")


def _check_length(scope: Scope, max_bytes: int) -> None:
    """Raise an ApiError for long headers; uvicorn refuses only those that come in pieces."""
    target = len(scope["raw_path"]) + len(scope["query_string"])
    if target + sum(len(name) + len(value) for name, value in scope["headers"]) > max_bytes:
        message = f"address and headers have more than {max_bytes:,} bytes"
        raise ApiError(431, message)


def _check_framing(scope: Scope, headers: Headers) -> None:
    """Raise an ApiError, and end the connection, where a proxy may see another request than this.

    A body with two lengths, or in chunks for HTTP/1.0, ends elsewhere for a proxy that reads the
    other length: what is behind it would be a request of its own (request smuggling).
    """
    is_chunked = "transfer-encoding" in headers
    if is_chunked and ("content-length" in headers or scope["http_version"] == "1.0"):
        message = "the body's length is told twice: by Content-Length or the end of the connection "
        raise _framing_error(f"{message}and by Transfer-Encoding")
    for name in SINGLE_HEADERS:
        if len(headers.getlist(name)) > 1:
            raise _framing_error(f"the header {name} is there twice")


def _framing_error(message: str) -> ApiError:
    return ApiError(400, message, headers={"Connection": "close"})


def _without_port(host: str) -> str:
    """Return the name in a Host header, in lower case."""
    name, colon, port = host.lower().rpartition(":")
    return name if colon and (port.isdecimal() or not port) else host.lower()


def _check_key(given: list[str], api_key: str) -> None:
    kind, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    is_right = hmac.compare_digest(key.strip().encode(), api_key.encode())
    if kind.lower() != "bearer" or not is_right:
        problem = "the key is wrong" if given else "a key is needed"
        message = f"{problem}; send the header 'Authorization: Bearer KEY'"
        headers = {"WWW-Authenticate": "Bearer"}
        raise ApiError(401, message, code="invalid_api_key", headers=headers)
