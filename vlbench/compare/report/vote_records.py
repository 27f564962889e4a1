"""Votes on answers that were shown side by side: a JSON line each, as `serve` writes them.

    {"time": "2026-05-04T10:11:12+00:00", "models": ["llava", "qformer"], "blind": true,
     "question": "What is it?", "image_sha256": ["9f86..."], "answers": ["A cat.", "A dog."],
     "choice": 0}

`models` and `answers` are in the order in which they were shown; `choice` is the index of the best
answer, "tie" or "bad" (none of them is good).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError, model_validator

from vlbench.errors import UserError, suggest_name
from vlbench.regular_files import MAX_RECORDS_BYTES, describe_failure, read_until_zero
from vlbench.strict_values import FileRecord, describe_error
from vlbench.text_files import parse_json

TIE, BAD = "tie", "bad"


class Vote(FileRecord):
    """One line: which models were shown, about what, and which was chosen."""

    models: list[str]
    """Names in the order shown."""
    blind: bool
    """Whether the voter did not see the names."""
    question: str
    image_sha256: list[str]
    """Of the pictures in the conversation."""
    choice: int | str
    """Index of the best answer, `TIE` or `BAD`."""

    @model_validator(mode="after")
    def _check_choice(self) -> Vote:
        """Refuse a choice that is no answer, and models that cannot be told apart."""
        if len(set(self.models)) < max(2, len(self.models)):
            raise ValueError(f"models must be two or more different ones, given {self.models}")
        if isinstance(self.choice, str):
            if self.choice not in (TIE, BAD):
                near = suggest_name(self.choice, (TIE, BAD))
                raise ValueError(
                    f"choice must be an index, tie or bad, given '{self.choice}'.{near}"
                )
        elif not 0 <= self.choice < len(self.models):
            last = len(self.models) - 1
            raise ValueError(f"choice must be from 0 to {last}, tie or bad, given {self.choice}")
        return self

    @property
    def is_decided(self) -> bool:
        """Whether one answer was chosen."""
        return isinstance(self.choice, int)

    @property
    def is_first_chosen(self) -> bool:
        """Whether the answer that was shown first was chosen."""
        return self.choice == 0


@dataclass(frozen=True)
class VoteFiles:
    """What some files hold."""

    names: list[str]
    votes: list[Vote]
    repeated: int
    """Lines that stand there a second time, word for word: not counted again."""
    bad_lines: list[str]
    """A sentence for each line that is no vote: where it is, and what is wrong."""


def read_votes(files: Sequence[Path]) -> VoteFiles:
    """Return the votes in `files`; a UserError for a file that cannot be read, or no vote."""
    votes, bad_lines = [], []
    seen: set[bytes] = set()
    repeated = 0
    for place, line in _numbered_lines(files):
        if line in seen:
            repeated += 1
            continue
        seen.add(line)
        try:
            votes.append(_parse_vote(line))
        except ValueError as error:
            bad_lines.append(f"{place} {error}")
    if not votes:
        why = f"; {bad_lines[0]}" if bad_lines else ""
        raise UserError(f"votes={','.join(map(str, files))} has no vote{why}")
    return VoteFiles([str(file) for file in files], votes, repeated, bad_lines)


def _numbered_lines(files: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """Yield the lines that are not empty, each with where it stands."""
    for file in files:
        try:
            data, _ = read_until_zero(file, MAX_RECORDS_BYTES)
        except (OSError, UserError) as error:
            raise UserError(f"votes={file} {describe_failure(error)}") from error
        for number, line in enumerate(data.split(b"\n"), 1):
            if line.strip():
                yield f"{file} line {number}:", bytes(line.strip())


def _parse_vote(line: bytes) -> Vote:
    """Return the vote of a line; a ValueError says what is wrong with it."""
    try:
        record = parse_json(line.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError("is not a JSON object")
    try:
        return Vote.model_validate(record)
    except ValidationError as error:
        details = error.errors()[0]
        key = str(details["loc"][0]) if details["loc"] else ""
        raise ValueError(f"{key} {describe_error(details)}".strip()) from None
