"""Votes on answers that were shown side by side without their models' names: a JSON line each.

    {"time": "2026-05-04T10:11:12.131415+00:00", "models": ["llava", "qformer"], "blind": true,
     "question": "What is it?", "image_sha256": ["9f86..."], "answers": ["A cat.", "A dog."],
     "choice": 0}

`models` and `answers` are in the order in which they were shown; `choice` is the index of the best
answer, "tie", or "bad" (none is good). Pictures are not kept, their hashes are.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from vlbench.errors import UserError, describe_json_type, suggest_name
from vlbench.serve.data_urls import read_data_url
from vlbench.system_errors import explain_unwritable
from vlbench.text_files import append_json_lines

MAX_TEXT = 200_000  # characters of a question or an answer
MAX_MODELS, MAX_IMAGES = 16, 64
Text = Annotated[str, Field(max_length=MAX_TEXT)]


def _check_choice(value: object) -> object:
    """Refuse what is no choice in one sentence; pydantic would tell of each kind that it may be."""
    if type(value) is int or value in ("tie", "bad"):
        return value
    raise ValueError(f"is {describe_json_type(value)}; allowed are an index, tie and bad")


class Vote(BaseModel):
    """A vote as the page sends it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    models: list[Text] = Field(min_length=2, max_length=MAX_MODELS)
    """Names in the order shown."""
    question: Text = Field(min_length=1)
    images: list[str] = Field(max_length=MAX_IMAGES)
    """The pictures of the conversation, as data URLs."""
    answers: list[Text] = Field(max_length=MAX_MODELS)
    """In the order of `models`."""
    choice: Annotated[int | Literal["tie", "bad"], BeforeValidator(_check_choice)]
    """Index of the best answer, or that none is better, or that none is good."""


class VoteFile:
    """The file `votes=`, to which several requests may write at once."""

    def __init__(self, path: Path, model_names: Collection[str]) -> None:
        """Keep votes on these models in `path`; the error for people if it cannot be written."""
        self.path, self.model_names = path, model_names
        self._lock = threading.Lock()
        self._append_records([])

    def add_vote(self, vote: Vote) -> None:
        """Write a vote as one line, which is on the disk when this returns.

        Raises a UserError for a vote that contradicts itself or names a model that is not here, an
        EnvironmentFailure for a full disk.
        """
        record = self._make_record(vote)
        with self._lock:
            self._append_records([record])

    def _append_records(self, records: list[dict[str, Any]]) -> None:
        try:
            append_json_lines(self.path, records, is_synced=True)
        except OSError as error:
            raise explain_unwritable(error, f"votes={self.path}") from error

    def _make_record(self, vote: Vote) -> dict[str, Any]:
        for name in vote.models:
            if name not in self.model_names:
                near = suggest_name(name, self.model_names)
                raise UserError(f"models: there is no model '{name:.100}' here.{near}")
        if len(set(vote.models)) < len(vote.models):
            raise UserError("models: one is named twice")
        if len(vote.answers) != len(vote.models):
            raise UserError(f"answers: {len(vote.answers)} for {len(vote.models)} models")
        if isinstance(vote.choice, int) and not 0 <= vote.choice < len(vote.models):
            raise UserError(
                f"choice: {vote.choice}; allowed are 0 to {len(vote.models) - 1}, tie and bad"
            )
        return {
            "time": datetime.now(UTC).isoformat(timespec="microseconds"),
            "models": vote.models,
            "blind": True,
            "question": vote.question,
            "image_sha256": [_hash_picture(url) for url in vote.images],
            "answers": vote.answers,
            "choice": vote.choice,
        }


def _hash_picture(url: str) -> str:
    """Return the SHA-256 of the bytes in a data URL, in hexadecimal digits."""
    try:
        return hashlib.sha256(read_data_url(url)).hexdigest()
    except UserError as error:
        raise UserError(f"images: {error}") from None
