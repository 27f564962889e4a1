"""OpenAI's messages as those that vlbench's models read: texts, and images in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlbench.errors import describe_json_type
from vlbench.processor import ChatMessage
from vlbench.serve.api.api_errors import ApiError
from vlbench.serve.api.image_inputs import RequestImages

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""OpenAI's roles -> those of the chat-message format; tools have no role here."""
IMAGE_DETAILS = (None, "auto", "low", "high")
"""Accepted, and without effect: a model sees every image at its own size."""
MAX_PARTS = 2_000  # of a message


def build_messages(given: Sequence[Any], images: RequestImages) -> list[ChatMessage]:
    """Return messages in the chat-message format, with the images that `images` opens.

    ApiError 400 names the field that is wrong, as messages[0].content[1].image_url.
    """
    return [
        _build_message(message, f"messages[{number}]", images)
        for number, message in enumerate(given)
    ]


def _build_message(message: Any, place: str, images: RequestImages) -> ChatMessage:
    if not isinstance(message, dict):
        raise _message_error(place, f"is {describe_json_type(message)}; wanted is an object")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        allowed = ", ".join(ROLES)
        raise _message_error(
            f"{place}.role", f"is {describe_json_type(role)}; allowed are {allowed}"
        )
    _refuse_other_fields(message, place, ("role", "content"))
    content = message.get("content")
    if isinstance(content, str):
        return {"role": ROLES[role], "content": content}
    if not isinstance(content, list) or not 0 < len(content) <= MAX_PARTS:
        wanted = f"wanted is a text, or a list of 1 to {MAX_PARTS} parts"
        raise _message_error(f"{place}.content", f"is {describe_json_type(content)}; {wanted}")
    parts = [
        _build_part(part, f"{place}.content[{number}]", images)
        for number, part in enumerate(content)
    ]
    return {"role": ROLES[role], "content": parts}


def _build_part(part: Any, place: str, images: RequestImages) -> dict[str, Any]:
    """Return a part of a message: a text, or an image."""
    if not isinstance(part, dict):
        raise _message_error(place, f"is {describe_json_type(part)}; wanted is an object")
    kind = part.get("type")
    if kind == "text":
        _refuse_other_fields(part, place, ("type", "text"))
        text = part.get("text")
        if not isinstance(text, str):
            raise _message_error(
                f"{place}.text", f"is {describe_json_type(text)}; wanted is a text"
            )
        return {"type": "text", "text": text}
    if kind == "image_url":
        _refuse_other_fields(part, place, ("type", "image_url"))
        url = _image_url(part.get("image_url"), f"{place}.image_url")
        return {"type": "image", "image": images.open(url, f"{place}.image_url")}
    given = describe_json_type(kind)
    raise _message_error(f"{place}.type", f"is {given}; allowed are text and image_url")


def _image_url(value: Any, place: str) -> str:
    url = value.get("url") if isinstance(value, dict) else None
    if not isinstance(url, str):
        given = describe_json_type(value)
        raise _message_error(place, f"is {given}; wanted is an object with a url")
    _refuse_other_fields(value, place, ("url", "detail"))
    detail = value.get("detail")
    if detail not in IMAGE_DETAILS:
        given = describe_json_type(detail)
        raise _message_error(f"{place}.detail", f"is {given}; allowed are auto, low and high")
    return url


def _refuse_other_fields(fields: Mapping[str, Any], place: str, known_names: Sequence[str]) -> None:
    """Raise an ApiError for a field that is not known and says something.

    OpenAI's client sends an answer back with its empty fields (tool_calls, refusal, audio).
    """
    for name, value in fields.items():
        if name not in known_names and value not in (None, [], {}):
            given = describe_json_type(value)
            raise _message_error(
                f"{place}.{name:.100}", f"is {given}; this server does not read it"
            )


def _message_error(place: str, problem: str) -> ApiError:
    return ApiError(400, f"{place} {problem}", code="invalid_value", param=place)
