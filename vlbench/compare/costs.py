"""What the rows of a comparison cost, and which of them nothing else beats at its price."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vlbench.compare.cautions import BUDGET
from vlbench.compare.findings import Row

MORE = {
    "samples": "samples seen in training",
    "images": "images seen in training",
    "tokens_seen": "tokens seen in training",
}
"""Further keys of a budget, of runs that count them."""


def known(rows: Sequence[Row]) -> dict[str, str]:
    """Return the keys of the budget that any row has, with their labels."""
    return {key: label for key, label in BUDGET.items() if any(key in r.budget for r in rows)}


def card(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """Return everything known of the rows' costs: a label and the value of each row, "" if none."""
    lines = [(label, _each(rows, _budget(key))) for key, label in {**BUDGET, **MORE}.items()]
    for part in _inside(rows, "parts"):
        lines.append((f"parameters of {part}", _each(rows, _part(part, "total"))))
        lines.append((f"of these trained, {part}", _each(rows, _part(part, "trained"))))
    for stage in _inside(rows, "step_seconds"):
        lines.append((f"seconds of a step, {stage}", _each(rows, _step(stage))))
    lines += [
        ("seconds of the run, mean over seeds", _each(rows, lambda r: _text(r.mean("seconds"), 0))),
        ("text tokens per second, last stage", _each(rows, _rate)),
        ("peak memory, GB", _each(rows, _memory)),
    ]
    return [(label, values) for label, values in lines if any(values)]


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return which (cost, quality) no other point beats: not dearer, not worse, and not both alike.

    Cheapest first: the Pareto frontier. Of points that are the same all are on it.
    """

    def beaten(cost: float, quality: float) -> bool:
        return any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points)

    best = [index for index, point in enumerate(points) if not beaten(*point)]
    return sorted(best, key=lambda index: points[index])


def _each(rows: Sequence[Row], value: Callable[[Row], str]) -> list[str]:
    return [value(row) for row in rows]


def _inside(rows: Sequence[Row], key: str) -> list[str]:
    """Return the names inside of a mapping of the budget, in the order of their first row."""
    return list(dict.fromkeys(name for row in rows for name in row.budget.get(key) or {}))


def _budget(key: str) -> Callable[[Row], str]:
    return lambda row: _text(row.budget.get(key), 0)


def _part(name: str, which: str) -> Callable[[Row], str]:
    return lambda row: _text(((row.budget.get("parts") or {}).get(name) or {}).get(which), 0)


def _step(stage: str) -> Callable[[Row], str]:
    return lambda row: _text((row.budget.get("step_seconds") or {}).get(stage), 3)


def _rate(row: Row) -> str:
    return _text(row.mean("tokens_per_second"), 0)


def _memory(row: Row) -> str:
    peaks = [run.results.get("peak_memory_bytes") for run in row.runs]
    found = [peak for peak in peaks if peak is not None]
    return f"{max(found) / 1e9:.2f}" if found else ""


def _text(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"
