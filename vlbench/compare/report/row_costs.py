"""Costs of the rows of a comparison, and the Pareto frontier of cost and accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vlbench.compare.report.analysis import RowResult
from vlbench.compare.report.finished_runs import BUDGET_LABELS

TRAINING_LABELS = {
    "samples": "samples seen in training",
    "images": "images seen in training",
    "views": "views of these images",
    "tokens_seen": "tokens seen in training",
    "supervised_tokens": "supervised tokens in training",
    "truncated_samples": "samples cut at max_length",
    "lost_supervised_tokens": "supervised tokens lost by that",
    "reduced_samples": "samples with fewer tiles for max_visual_tokens",
}
"""Further keys of `budget` in results.json -> labels; not every run has them."""


def available_budgets(rows: Sequence[RowResult]) -> dict[str, str]:
    """Return the keys of `BUDGET_LABELS` that any row has, with their labels."""
    return {
        key: label for key, label in BUDGET_LABELS.items() if any(key in row.budget for row in rows)
    }


def cost_table(rows: Sequence[RowResult]) -> list[tuple[str, list[str]]]:
    """Return the lines of the cost table: a label, and the value of each row, "" if not known."""
    is_tiled = any(row.budget.get("views") != row.budget.get("images") for row in rows)
    lines = [
        (label, _value_per_row(rows, _budget_getter(key)))
        for key, label in {**BUDGET_LABELS, **TRAINING_LABELS}.items()
        if key != "views" or is_tiled
    ]
    for part in _nested_names(rows, "parts"):
        lines.append(
            (f"parameters of {part}", _value_per_row(rows, _parameters_getter(part, "total")))
        )
        lines.append(
            (f"of these trained, {part}", _value_per_row(rows, _parameters_getter(part, "trained")))
        )
    for stage in _nested_names(rows, "step_seconds"):
        lines.append(
            (f"seconds of a step, {stage}", _value_per_row(rows, _step_seconds_getter(stage)))
        )
    lines += [
        (
            "seconds of the run, mean over seeds",
            _value_per_row(rows, lambda row: _format_number(row.mean_result("seconds"), 0)),
        ),
        (
            "tokens per second, images included, last stage",
            _value_per_row(rows, _tokens_per_second),
        ),
        ("peak memory, GB", _value_per_row(rows, _peak_memory)),
    ]
    return [(label, values) for label, values in lines if any(values)]


def pareto_frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the (cost, quality) points on the Pareto frontier, cheapest first.

    A point is dominated by another one with at most its cost and at least its quality. Equal points
    do not dominate each other.
    """

    def is_dominated(cost: float, quality: float) -> bool:
        return any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points)

    frontier = [index for index, point in enumerate(points) if not is_dominated(*point)]
    return sorted(frontier, key=lambda index: points[index])


def _value_per_row(rows: Sequence[RowResult], row_value: Callable[[RowResult], str]) -> list[str]:
    return [row_value(row) for row in rows]


def _nested_names(rows: Sequence[RowResult], budget_key: str) -> list[str]:
    """Return the keys of a nested mapping of the budget over all rows, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.budget.get(budget_key) or {}))


def _budget_getter(key: str) -> Callable[[RowResult], str]:
    return lambda row: _format_number(row.budget.get(key), 0)


def _parameters_getter(part: str, count_key: str) -> Callable[[RowResult], str]:
    return lambda row: _format_number(
        ((row.budget.get("parts") or {}).get(part) or {}).get(count_key), 0
    )


def _step_seconds_getter(stage: str) -> Callable[[RowResult], str]:
    return lambda row: _format_number((row.budget.get("step_seconds") or {}).get(stage), 3)


def _tokens_per_second(row: RowResult) -> str:
    return _format_number(row.mean_result("tokens_per_second"), 0)


def _peak_memory(row: RowResult) -> str:
    peaks = [run.results.get("peak_memory_bytes") for run in row.runs]
    known = [peak for peak in peaks if peak is not None]
    return f"{max(known) / 1e9:.2f}" if known else ""


def _format_number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"
