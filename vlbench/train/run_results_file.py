"""A run's results.json, read with the kinds of its values: the folder may be somebody else's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from vlbench.strict_values import FileRecord, check_record
from vlbench.text_files import read_json

INFORMATION_FILE = "information.json"  # what information probes found, beside the results
Share = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0, le=1e27)]
"""Seconds, bytes, counts, FLOPs: a thousand times what the largest trainings have taken."""


class PartCounts(FileRecord):
    """Parameters of a part."""

    total: Amount | None = None
    trained: Amount | None = None


class RunBudget(FileRecord):
    """What a run cost."""

    parameters: Amount | None = None
    tokens: Amount | None = None
    latents: Amount | None = None
    flops: Amount | None = None
    cache: Amount | None = None
    samples: Amount | None = None
    images: Amount | None = None
    tokens_seen: Amount | None = None
    supervised_tokens: Amount | None = None
    truncated_samples: Amount | None = None
    lost_supervised_tokens: Amount | None = None
    reduced_samples: Amount | None = None
    steps: dict[str, Amount] | None = None
    epochs: dict[str, Amount] | None = None
    unused_objectives: list[str] | None = None
    parts: dict[str, PartCounts] | None = None
    step_seconds: dict[str, Amount] | None = None


class RunResults(FileRecord):
    """The results of a run; what a version does not know it leaves alone."""

    accuracy: Share | None = None
    unseen_accuracy: Share | None = None
    blank_accuracy: Share | None = None
    shuffled_accuracy: Share | None = None
    accuracy_by_type: dict[str, Share] = {}
    accuracy_by_language: dict[str, Share] = {}
    questions: Annotated[int, Field(ge=0)] = 0
    skipped_questions: Annotated[int, Field(ge=0)] = 0
    asked_of: str = ""
    seconds: Amount | None = None
    peak_memory_bytes: Amount | None = None
    loss: Annotated[float, Field(allow_inf_nan=True)] | None = None
    tokens_per_second: Amount | None = None
    commit: str | None = None
    budget: RunBudget | None = None


def read_results(file: Path) -> dict[str, Any]:
    """Return the content of a results.json; a UserError names a value that no run has."""
    return check_record(read_json(file), RunResults, file)
