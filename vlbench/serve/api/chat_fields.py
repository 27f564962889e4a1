"""The fields of a chat completion: which are taken, which change nothing, which are refused.

What OpenAI's clients send and what changes nothing here is accepted, so that they work unchanged. A
field that would change the answer and is not done here is refused by name: an answer that silently
lacks what was asked for would end in somebody's table.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from vlbench.errors import describe_json_type, suggest_name
from vlbench.model.generation.sampling_options import MIN_TEMPERATURE, TRANSFORMERS_HINTS
from vlbench.serve.api.api_errors import ApiError
from vlbench.serve.api.request_body import read_fields

MAX_ANSWER_TOKENS = 100_000
DEFAULT_ANSWER_TOKENS = 512  # as of `chat`
MAX_STOP_TEXTS = 4
MAX_STOP_LENGTH = 1_000  # characters
MAX_MESSAGES = 2_000
MAX_REQUEST_SEED = 2**64 - 1
UNUSED_FIELDS = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
)
"""Of OpenAI's account and caches: any value is accepted, and none changes an answer."""
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "verbosity": ("medium",),
    "reasoning_effort": ("none",),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
"""Fields that are not done here, and those of their values that change nothing, beside null."""


class StreamOptions(BaseModel):
    """What a stream holds beside the text."""

    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool | None = None
    """Whether a last chunk tells the numbers of tokens."""


class ChatFields(BaseModel):
    """The fields of a request for a chat completion; what is not named here is checked by name."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    model: str
    messages: Annotated[list[Any], Field(min_length=1, max_length=MAX_MESSAGES)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_ANSWER_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_ANSWER_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=MAX_REQUEST_SEED)] | None = None
    stop: Any = None

    @property
    def answer_tokens(self) -> int:
        """The most tokens of the answer."""
        return self.max_completion_tokens or self.max_tokens or DEFAULT_ANSWER_TOKENS

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def chosen_seed(self) -> int:
        """Return the seed, one drawn anew where none was sent: answers that are drawn then differ.

        OpenAI's may be negative.
        """
        return secrets.randbelow(2**32) if self.seed is None else self.seed % 2**64

    def stop_texts(self) -> tuple[str, ...]:
        """Return the texts that end the answer."""
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(texts)


def read_chat_fields(body: Mapping[str, Any]) -> ChatFields:
    """Return the fields of a body; ApiError 400 names the first that is wrong or not done here."""
    fields = read_fields(ChatFields, body)
    _check_stop(fields.stop)
    if fields.temperature and fields.temperature < MIN_TEMPERATURE:
        message = f"temperature is {fields.temperature}; allowed are 0 (greedy) and numbers from "
        raise _field_error("temperature", f"{message}{MIN_TEMPERATURE}")
    for name, value in (fields.model_extra or {}).items():
        _check_other_field(name, value)
    return fields


def _check_stop(stop: Any) -> None:
    texts = [stop] if isinstance(stop, str) else stop
    if texts is None:
        return
    is_list = isinstance(texts, list) and len(texts) <= MAX_STOP_TEXTS
    if not is_list or not all(
        isinstance(text, str) and 0 < len(text) <= MAX_STOP_LENGTH for text in texts
    ):
        allowed = f"a text or up to {MAX_STOP_TEXTS}, of 1 to {MAX_STOP_LENGTH} characters"
        raise _field_error("stop", f"stop is {describe_json_type(stop)}; allowed is {allowed}")


def _check_other_field(name: str, value: object) -> None:
    """Raise an ApiError for a field that would change the answer, and for unknown names.

    Clients send null for what they leave to the server, whatever its name.
    """
    if value is None or name in UNUSED_FIELDS:
        return
    if name in NEUTRAL_VALUES:
        neutral = NEUTRAL_VALUES[name]
        if any(_is_same(value, one) for one in neutral):
            return
        told = f"; only {' or '.join(map(json.dumps, neutral))} is allowed" if neutral else ""
        message = f"{name} is {describe_json_type(value)}, which this server does not do{told}"
        raise _field_error(name, message, code="unsupported_parameter")
    hint = f" {TRANSFORMERS_HINTS[name]}." if name in TRANSFORMERS_HINTS else ""
    hint = hint or suggest_name(name[:100], ChatFields.model_fields)
    message = f"there is no field '{name:.100}' here.{hint}"
    raise _field_error(name[:100], message, code="unknown_parameter")


def _is_same(value: object, neutral: object) -> bool:
    """Return whether a value is the neutral one; true is no 1."""
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


def _field_error(param: str, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, code=code, param=param)
