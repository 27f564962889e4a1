"""What diagnostics.json tells of trained models: where they look, and which tokens they use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from vlbench.compare.report.analysis import RowResult
from vlbench.compare.report.svg_figure import (
    FIGURE_WIDTH,
    MUTED_COLOR,
    figure_to_svg,
    plot_style,
    row_style,
    wrap_label,
)
from vlbench.errors import UserError
from vlbench.html_pages import image_data_uri
from vlbench.text_files import read_json

HEATMAP_COLOR = (213, 94, 0)  # Okabe and Ito's vermilion
HEATMAP_OPACITY = 0.85  # opacity of the hottest patch
PANELS_ACROSS = 3  # small plots beside one another

PatchMap = list[list[float]]
"""A value for each patch, row by row."""


@dataclass(frozen=True)
class RowHeatmap:
    """Where a row looked for its answer."""

    row_name: str
    answer: str
    correct: bool
    patch_map: PatchMap | None


@dataclass(frozen=True)
class QuestionHeatmaps:
    """How all rows looked at one question."""

    question_id: str
    question: str
    truth: str
    row_heatmaps: list[RowHeatmap]


@dataclass(frozen=True)
class RowDiagnostics:
    """The diagnostics of a row, from its first run."""

    row_name: str
    question_maps: list[dict[str, Any]]
    """Per question id, question, answer, truth, grid and relevance."""
    token_shares: list[float]
    """The share of each visual token in the answers; [] where none of them counts."""
    effective_tokens: float
    """How many visual tokens are used: exp of the entropy of the shares."""
    attention: dict[str, Any] | None
    """entropy and uniform in nats, and a map per question; None if the connector has none."""


def load_diagnostics(rows: Sequence[RowResult]) -> list[RowDiagnostics]:
    """Return the diagnostics of those rows whose first run has them."""
    return [inside for row in rows if (inside := _load_row_diagnostics(row)) is not None]


def _load_row_diagnostics(row: RowResult) -> RowDiagnostics | None:
    file = row.runs[0].folder / "diagnostics.json"
    if not file.is_file():
        return None
    found = read_json(file)
    try:
        return RowDiagnostics(
            row.name,
            [dict(one) for one in found["maps"]],
            [float(share) for share in found["tokens"] or []],
            float(found["effective"] or 0),
            found.get("attention"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: holds no diagnostics ({error})") from error


def relevance_heatmaps(diagnostics: Sequence[RowDiagnostics]) -> list[QuestionHeatmaps]:
    """Return, question by question, where each row's answer came from."""
    return _group_by_question(
        diagnostics,
        {
            inside.row_name: [m.get("relevance") for m in inside.question_maps]
            for inside in diagnostics
        },
    )


def attention_heatmaps(diagnostics: Sequence[RowDiagnostics]) -> list[QuestionHeatmaps]:
    """Return, question by question, what the tokens of each row read that attends."""
    attends = [inside for inside in diagnostics if inside.attention]
    return _group_by_question(
        attends, {one.row_name: (one.attention or {}).get("maps", []) for one in attends}
    )


def _group_by_question(
    diagnostics: Sequence[RowDiagnostics], maps_by_row: dict[str, list[PatchMap | None]]
) -> list[QuestionHeatmaps]:
    questions: dict[str, QuestionHeatmaps] = {}
    for inside in diagnostics:
        for one, values in zip(inside.question_maps, maps_by_row[inside.row_name], strict=False):
            first = QuestionHeatmaps(one["id"], one["question"], one["truth"], [])
            right = one["answer"] == one["truth"]
            looks = questions.setdefault(one["id"], first).row_heatmaps
            looks.append(RowHeatmap(inside.row_name, one["answer"], right, values))
    return list(questions.values())


def heatmap_uri(patch_values: Sequence[Sequence[float]]) -> str:
    """Return a map of patches as a picture to lay over another: the more, the less is seen through.

    The largest value of the map has the full colour.
    """
    share = np.asarray(patch_values, float)
    share = np.clip(share / max(float(share.max()), 1e-12), 0, 1)
    pixels = np.empty((*share.shape, 4), np.uint8)
    pixels[..., :3] = HEATMAP_COLOR
    pixels[..., 3] = np.round(255 * HEATMAP_OPACITY * share)
    return image_data_uri(Image.fromarray(pixels), "PNG", optimize=True)


@plot_style()
def plot_token_shares(diagnostics: Sequence[RowDiagnostics], row_names: Sequence[str]) -> Markup:
    """Draw how much each visual token of each row matters, against an even share."""
    down = math.ceil(len(diagnostics) / PANELS_ACROSS)
    across = min(PANELS_ACROSS, len(diagnostics))
    figure = Figure(
        figsize=(
            FIGURE_WIDTH * across / PANELS_ACROSS if across > 1 else FIGURE_WIDTH / 2,
            0.3 + 1.9 * down,
        )
    )
    panels = figure.subplots(down, across, squeeze=False).flat
    for inside, panel in zip(diagnostics, panels, strict=False):
        count = len(inside.token_shares)
        colour = row_style(row_names.index(inside.row_name))["color"]
        panel.stairs(inside.token_shares, fill=True, color=colour)
        panel.axhline(1 / max(1, count), color=MUTED_COLOR, linewidth=1, linestyle="--")
        panel.set_title(
            f"{wrap_label(inside.row_name, 24)}\n{inside.effective_tokens:.1f} of {count:,}"
        )
        panel.set_xlabel("visual token")
        panel.grid(axis="x", visible=False)
    for panel in panels:  # those that are left over
        panel.set_axis_off()
    return figure_to_svg(
        figure, "plot-tokens", "Share of each visual token in the answers, row by row"
    )
