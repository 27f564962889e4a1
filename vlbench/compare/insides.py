"""What diagnostics.json tells of trained models: where they look, and which tokens they use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlbench.compare.findings import Row
from vlbench.files import read_json
from vlbench.mistakes import Mistake

Map = list[list[float]]
"""A value for each patch, row by row."""


@dataclass(frozen=True)
class Look:
    """Where a row looked for its answer."""

    row: str
    answer: str
    right: bool
    map: Map | None


@dataclass(frozen=True)
class Looks:
    """How all rows looked at one question."""

    id: str
    question: str
    truth: str
    looks: list[Look]


@dataclass(frozen=True)
class Inside:
    """The diagnostics of a row, from its first run."""

    row: str
    maps: list[dict[str, Any]]
    """Per question id, question, answer, truth, grid and relevance."""
    tokens: list[float]
    """The share of each visual token in the answers; [] where none of them counts."""
    effective: float
    """How many visual tokens are used: exp of the entropy of the shares."""
    attention: dict[str, Any] | None
    """entropy and uniform in nats, and a map per question; None if the connector has none."""


def insides(rows: Sequence[Row]) -> list[Inside]:
    """Return the diagnostics of those rows whose first run has them."""
    return [inside for row in rows if (inside := _read(row)) is not None]


def _read(row: Row) -> Inside | None:
    file = row.runs[0].folder / "diagnostics.json"
    if not file.is_file():
        return None
    found = read_json(file)
    try:
        return Inside(
            row.name,
            [dict(one) for one in found["maps"]],
            [float(share) for share in found["tokens"] or []],
            float(found["effective"] or 0),
            found.get("attention"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise Mistake(f"{file}: holds no diagnostics ({error})") from error


def relevance(found: Sequence[Inside]) -> list[Looks]:
    """Return, question by question, where each row's answer came from."""
    return _looks(
        found, {inside.row: [m.get("relevance") for m in inside.maps] for inside in found}
    )


def attention(found: Sequence[Inside]) -> list[Looks]:
    """Return, question by question, what the tokens of each row read that attends."""
    attends = [inside for inside in found if inside.attention]
    return _looks(attends, {one.row: (one.attention or {}).get("maps", []) for one in attends})


def _looks(found: Sequence[Inside], maps: dict[str, list[Map | None]]) -> list[Looks]:
    questions: dict[str, Looks] = {}
    for inside in found:
        for one, values in zip(inside.maps, maps[inside.row], strict=False):
            first = Looks(one["id"], one["question"], one["truth"], [])
            right = one["answer"] == one["truth"]
            looks = questions.setdefault(one["id"], first).looks
            looks.append(Look(inside.row, one["answer"], right, values))
    return list(questions.values())
