"""Errors of the API, as OpenAI's clients read them: a status, a message, a code, a parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from vlbench.errors import MAX_LINE_LENGTH, escape_to_one_line, shorten_words
from vlbench.strict_values import join_path

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable",
}
"""OpenAI's `type` by status; that of all others is invalid_request_error."""
STATUS_MESSAGES = {
    404: "there is nothing at this address; the API is at /v1/chat/completions and /v1/models",
    405: "this address does not take this method",
}
CLIENT_LEFT = 499  # nginx's number, for the counts alone: nobody reads the response
RETRY_SECONDS = {429: "2", 503: "5"}
"""Of the header Retry-After, by status; OpenAI's clients obey it."""


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Take what the client is told.

        Args:
            status: Of HTTP.
            message: For people; it is cut where it is long, and its control characters escaped.
            code: For programs, one of OpenAI's where there is one.
            param: The field that is wrong.
            headers: Further headers of the response.
        """
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        text = shorten_words(escape_to_one_line(message))
        self.message = text if len(text) <= MAX_LINE_LENGTH else f"{text[:MAX_LINE_LENGTH]}..."

    def to_json(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        kind = ERROR_TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def to_response(self) -> Response:
        """Return the response that tells it."""
        headers = dict(self.headers)
        if self.status in RETRY_SECONDS:
            headers.setdefault("Retry-After", RETRY_SECONDS[self.status])
        return JSONResponse(self.to_json(), self.status, headers)


def install_error_handlers(app: FastAPI) -> None:
    """Let every error of an application be answered with OpenAI's error object."""

    async def answer_api_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.to_response()

    async def answer_http_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = STATUS_MESSAGES.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, headers=error.headers).to_response()

    async def answer_invalid_fields(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        details = error.errors()[0]
        param = join_path(details["loc"][1:])
        return ApiError(400, f"{param}: {details['msg']}", param=param).to_response()

    async def answer_fault(_: Request, error: Exception) -> Response:
        return ApiError(500, "the server has a fault; its log says more").to_response()

    app.add_exception_handler(ApiError, answer_api_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_exception_handler(RequestValidationError, answer_invalid_fields)
    app.add_exception_handler(Exception, answer_fault)
