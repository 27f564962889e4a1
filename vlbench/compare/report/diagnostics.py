"""Diagnostics of trained models (diagnostics.json): maps of relevance and attention, token use."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image
from pydantic import AfterValidator, Field

from vlbench.compare.report.analysis import RowResult
from vlbench.compare.report.svg_figure import (
    FIGURE_WIDTH,
    MUTED_COLOR,
    figure_to_svg,
    plot_style,
    row_style,
    wrap_label,
)
from vlbench.html_pages import image_data_uri
from vlbench.strict_values import FileRecord, check_record
from vlbench.text_files import read_json

HEATMAP_COLOR = (213, 94, 0)  # Okabe and Ito's vermilion
HEATMAP_OPACITY = 0.85  # of the patch with the largest value
MAX_NUMBER = 500  # of shares and entropies, whose exp() is a number then
PANELS_ACROSS = 3  # panels in a row of a figure

PatchMap = list[list[float]]
"""A value for each patch: `[patch rows, patch columns]`."""
MapBox = list[float]
"""Left, top, right and bottom of a map, in shares of its picture's width and height."""


@dataclass(frozen=True)
class RowHeatmap:
    """The patch map of a row for one question, None if its answer does not depend on the image."""

    row_name: str
    answer: str
    correct: bool
    patch_map: PatchMap | None
    box: MapBox | None
    """None in a run of a version that did not write it."""


@dataclass(frozen=True)
class QuestionHeatmaps:
    """One question with the patch maps of all rows."""

    question_id: str
    question: str
    truth: str
    row_heatmaps: list[RowHeatmap]


def _check_map(rows: list[list[float]] | None) -> list[list[float]] | None:
    if rows is not None and (not rows or not rows[0] or len({len(row) for row in rows}) > 1):
        raise ValueError("must be rows of the same number of patches")
    return rows


def _check_box(box: list[float]) -> list[float]:
    if len(box) != 4 or box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError("must be left, top, right and bottom of a map")
    return box


def _check_size(number: float) -> float:
    """Return a number within limits, or NaN, as diverged models have it."""
    if abs(number) > MAX_NUMBER:
        raise ValueError(f"must be a number up to {MAX_NUMBER:,}, given {number:g}")
    return number


Number = Annotated[float, Field(allow_inf_nan=True), AfterValidator(_check_size)]
CheckedBox = Annotated[
    list[Annotated[float, AfterValidator(_check_size)]], AfterValidator(_check_box)
]
CheckedMap = Annotated[list[list[Number]] | None, AfterValidator(_check_map)]


class QuestionDiagnostics(FileRecord):
    """A question of diagnostics.json."""

    id: str
    question: str
    answer: str
    truth: str
    relevance: CheckedMap = None
    box: CheckedBox | None = None


class AttentionDiagnostics(FileRecord):
    """The attention of a connector."""

    entropy: Number
    uniform: Number
    maps: list[CheckedMap] = []


class RunDiagnostics(FileRecord):
    """A diagnostics.json."""

    maps: list[QuestionDiagnostics]
    tokens: list[Number] | None
    effective: Annotated[float, Field(allow_inf_nan=True)] | None
    attention: AttentionDiagnostics | None = None


@dataclass(frozen=True)
class RowDiagnostics:
    """The diagnostics of a row's first run."""

    row_name: str
    question_maps: list[dict[str, Any]]
    """For each question: id, question, answer, truth, grid, box and relevance."""
    token_shares: list[float]
    """The share of each visual token in the relevance for the answers; [] if none has any."""
    effective_tokens: float
    """Effective number of visual tokens: exp of the entropy of the shares."""
    attention: dict[str, Any] | None
    """`entropy` and `uniform` in nats, `maps` per question; None without attention."""


def load_diagnostics(rows: Sequence[RowResult]) -> list[RowDiagnostics]:
    """Return the diagnostics of the rows whose first run has them."""
    loaded = (_load_row_diagnostics(row) for row in rows)
    return [diagnostics for diagnostics in loaded if diagnostics is not None]


def _load_row_diagnostics(row: RowResult) -> RowDiagnostics | None:
    file = row.runs[0].folder / "diagnostics.json"
    if not file.is_file():
        return None
    content = check_record(read_json(file), RunDiagnostics, file)
    return RowDiagnostics(
        row_name=row.name,
        question_maps=content["maps"],
        token_shares=content["tokens"] or [],
        effective_tokens=content["effective"] or 0.0,
        attention=content.get("attention"),
    )


def relevance_heatmaps(diagnostics: Sequence[RowDiagnostics]) -> list[QuestionHeatmaps]:
    """Return for each question the relevance of the patches for the answer of each row."""
    return _group_by_question(
        diagnostics,
        {
            row.row_name: [question.get("relevance") for question in row.question_maps]
            for row in diagnostics
        },
    )


def attention_heatmaps(diagnostics: Sequence[RowDiagnostics]) -> list[QuestionHeatmaps]:
    """Return for each question the attention to the patches, of the rows that have attention."""
    with_attention = [row for row in diagnostics if row.attention]
    return _group_by_question(
        with_attention,
        {row.row_name: (row.attention or {}).get("maps", []) for row in with_attention},
    )


def _group_by_question(
    diagnostics: Sequence[RowDiagnostics], maps_by_row: dict[str, list[PatchMap | None]]
) -> list[QuestionHeatmaps]:
    questions: dict[str, QuestionHeatmaps] = {}
    for row in diagnostics:
        # a row may have fewer attention maps than questions
        for asked, patch_map in zip(row.question_maps, maps_by_row[row.row_name], strict=False):
            empty = QuestionHeatmaps(asked["id"], asked["question"], asked["truth"], [])
            is_correct = asked["answer"] == asked["truth"]
            questions.setdefault(asked["id"], empty).row_heatmaps.append(
                RowHeatmap(row.row_name, asked["answer"], is_correct, patch_map, asked.get("box"))
            )
    return list(questions.values())


def place_map(box: MapBox | None, width: int, height: int) -> dict[str, str]:
    """Return where a map lies over a picture: x, y, width and height, as an SVG has them.

    Without a `box` it is that of the picture padded to a square, as older runs had it.
    """
    side = max(width, height)
    if box is None:
        box = [(1 - side / width) / 2, (1 - side / height) / 2]
        box += [1 - box[0], 1 - box[1]]
    left, top, right, bottom = box
    places = (left * width, top * height, (right - left) * width, (bottom - top) * height)
    return {
        name: f"{value:.4g}"
        for name, value in zip(("x", "y", "width", "height"), places, strict=True)
    }


def heatmap_uri(patch_values: Sequence[Sequence[float]]) -> str:
    """Return a patch map as a PNG to overlay on an image: larger values are more opaque.

    The largest value of the map has the opacity `HEATMAP_OPACITY`.
    """
    values = np.nan_to_num(np.asarray(patch_values, float))
    shares = np.clip(values / max(float(values.max()), 1e-12), 0, 1)
    pixels = np.empty((*shares.shape, 4), np.uint8)
    pixels[..., :3] = HEATMAP_COLOR
    pixels[..., 3] = np.round(255 * HEATMAP_OPACITY * shares)
    return image_data_uri(Image.fromarray(pixels), "PNG", optimize=True)


@plot_style()
def plot_token_shares(diagnostics: Sequence[RowDiagnostics], labels: Mapping[str, str]) -> Markup:
    """Draw the share of each visual token, a panel for each row, against an even share.

    `labels` has the label of every row of the page: its order gives the colors.
    """
    row_names = list(labels)
    down = math.ceil(len(diagnostics) / PANELS_ACROSS)
    across = min(PANELS_ACROSS, len(diagnostics))
    figure = Figure(
        figsize=(
            FIGURE_WIDTH * across / PANELS_ACROSS if across > 1 else FIGURE_WIDTH / 2,
            0.3 + 1.9 * down,
        )
    )
    panels = figure.subplots(down, across, squeeze=False).flat
    for row, panel in zip(diagnostics, panels, strict=False):
        count = len(row.token_shares)
        color = row_style(row_names.index(row.row_name))["color"]
        panel.stairs(row.token_shares, fill=True, color=color)
        panel.axhline(1 / max(1, count), color=MUTED_COLOR, linewidth=1, linestyle="--")
        panel.set_title(
            f"{wrap_label(labels[row.row_name], 24)}\n{row.effective_tokens:.1f} of {count:,}"
        )
        panel.set_xlabel("visual token")
        panel.grid(axis="x", visible=False)
    for panel in panels:  # the iterator goes on at the panels without a row
        panel.set_axis_off()
    return figure_to_svg(
        figure, "plot-tokens", "Share of each visual token in the answers, row by row"
    )
