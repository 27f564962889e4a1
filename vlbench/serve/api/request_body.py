"""Bodies of requests: read within limits of size and time, singly and together; JSON, fields."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from vlbench.errors import describe_json_type, one_line
from vlbench.regular_files import format_bytes
from vlbench.serve.api.api_errors import ApiError
from vlbench.serve.api.api_settings import ApiSettings
from vlbench.strict_values import describe_error, join_path

FieldsT = TypeVar("FieldsT", bound=BaseModel)
JSON_TYPE = "application/json"


class BodyBudget:
    """The bytes of all bodies that are held at once; one that does not fit is refused."""

    def __init__(self, max_bytes: int) -> None:
        """Allow `max_bytes` in all."""
        self._free_bytes = max_bytes

    @contextlib.contextmanager
    def hold_bytes(self) -> Iterator[BodyBytes]:
        """Give what takes bytes for one body; they are free again on leaving."""
        body = BodyBytes(self)
        try:
            yield body
        finally:
            self._free_bytes += len(body.data)
            body.data = bytearray()

    def take_bytes(self, count: int) -> bool:
        """Return whether `count` more bytes fit, and hold them if so."""
        if count > self._free_bytes:
            return False
        self._free_bytes -= count
        return True


class BodyBytes:
    """The bytes of one body, as far as they have been read."""

    def __init__(self, budget: BodyBudget) -> None:
        """Take bytes from `budget`."""
        self.data = bytearray()
        self._budget = budget

    async def read_body(self, request: Request, settings: ApiSettings) -> None:
        """Read the body of a request; ApiError where it is too large or too slow.

        What is left of it then is thrown away by uvicorn, for `header_seconds`: a connection that
        is closed at once loses the response with it.
        """
        _check_headers(request)
        chunks = request.stream()
        try:
            async with asyncio.timeout(settings.body_seconds):
                if _announced_bytes(request) > settings.max_body_bytes:
                    raise _too_large_error(settings.max_body_bytes)
                while (chunk := await _next_chunk(chunks, settings.body_idle_seconds)) is not None:
                    if len(self.data) + len(chunk) > settings.max_body_bytes:
                        raise _too_large_error(settings.max_body_bytes)
                    if not self._budget.take_bytes(len(chunk)):
                        message = "the server holds as many bytes of requests as it may"
                        raise ApiError(429, message, code="queue_full")
                    self.data += chunk
        except TimeoutError:
            message = (
                f"the body has not arrived: at most {settings.body_idle_seconds:g} seconds without "
                f"a byte and {settings.body_seconds:g} in all are allowed"
            )
            raise ApiError(408, message) from None


def read_fields(kind: type[FieldsT], body: Mapping[str, Any]) -> FieldsT:
    """Return the fields of a body; ApiError 400 names the first that is wrong."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        param = join_path(details["loc"])
        message = f"{param} {describe_error(details)}"
        raise ApiError(400, message, code="invalid_value", param=param) from None


def parse_json_object(data: bytes | bytearray) -> dict[str, Any]:
    """Return the JSON object in a body; ApiError 400 for anything else, however deep it is."""
    try:
        value = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON ({one_line(error)})") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is {describe_json_type(value)}; wanted is a JSON object")
    return value


def _announced_bytes(request: Request) -> int:
    """Return the length that the headers tell, which uvicorn has checked; 0 where they do not."""
    return int(request.headers.get("content-length", "0"))


def _check_headers(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON_TYPE:
        message = f"Content-Type is '{kind:.60}'; wanted is {JSON_TYPE}"
        raise ApiError(400, message)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        message = "Content-Encoding is not taken; send the JSON as it is"
        raise ApiError(400, message)


def _too_large_error(max_bytes: int) -> ApiError:
    message = f"the body has more than {format_bytes(max_bytes)}, which are allowed"
    return ApiError(413, message, code="request_too_large")


async def _next_chunk(chunks: AsyncIterator[bytes], idle_seconds: float) -> bytes | None:
    """Return the next bytes of a body, None at its end."""
    async with asyncio.timeout(idle_seconds):
        return await anext(chunks, None)
