"""Plots of how rows came about and what goes on inside: losses, gates, use of tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from vlbench.compare.report.diagnostics import RowDiagnostics
from vlbench.compare.report.metric_curves import (
    MetricSeries,
    MetricsTable,
    metric_columns,
    series_by_stage,
    stage_names,
)
from vlbench.compare.report.svg_figure import (
    FIGURE_WIDTH,
    MUTED_COLOR,
    figure_to_svg,
    make_subplots,
    plot_style,
    row_style,
    wrap_label,
)

LOG_SCALE_RATIO = 8  # losses that fall to less than a part in this are drawn on a logarithmic axis
PANELS_ACROSS = 3  # small plots beside one another


@plot_style()
def plot_losses(
    tables_by_row: Mapping[str, Sequence[MetricsTable]], row_names: Sequence[str]
) -> Markup:
    """Draw held-out losses (thick) and training losses (thin) of rows, a panel for each stage.

    `order` names all rows: the place of a row gives its look.
    """
    names = stage_names([table for found in tables_by_row.values() for table in found])
    figure, (panels,) = make_subplots(3.4, columns=max(1, len(names)))
    for row, found in tables_by_row.items():
        style = row_style(row_names.index(row))
        trained, held_out = series_by_stage(found, "loss"), series_by_stage(found, "held_out_loss")
        for panel, stage in zip(panels, names, strict=False):
            if stage in trained:
                one = trained[stage]
                panel.plot(one.steps, one.mean, color=style["color"], linewidth=0.7, alpha=0.55)
            if stage in held_out:
                _plot_with_band(
                    panel, held_out[stage], {**style, "markersize": 4.5, "linewidth": 1.8}
                )
    for panel in panels:
        low, high = panel.dataLim.intervaly
        if 0 < low and high > LOG_SCALE_RATIO * low and math.isfinite(high):
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
            panel.yaxis.set_minor_formatter(NullFormatter())
    _label_stage_panels(panels, names, "loss")
    return figure_to_svg(figure, "plot-losses", "Losses of each row against steps, stage by stage")


def _plot_with_band(axes: Axes, series: MetricSeries, style: dict[str, Any]) -> None:
    axes.plot(series.steps, series.mean, **style)
    axes.fill_between(
        series.steps, series.low, series.high, color=style["color"], alpha=0.18, linewidth=0
    )


def _label_stage_panels(panels: Sequence[Axes], stages: Sequence[str], label: str) -> None:
    """Name the stages; the axes between them are their borders."""
    for panel, stage in zip(panels, stages, strict=False):
        panel.set_title(wrap_label(stage, 24))
        panel.set_xlabel("step of the stage")
    panels[0].set_ylabel(label)


@plot_style()
def plot_gates(tables: Sequence[MetricsTable], svg_id: str, row_name: str) -> Markup | None:
    """Draw the gates of a row against steps, early layers dark; None if it has none."""
    shown = metric_columns(tables, "gate_")
    if not shown:
        return None
    names = stage_names(tables)
    figure, (panels,) = make_subplots(2.9, columns=len(names), sharey=True)
    layers = sorted({_layer_index(column) for column in shown})
    for column in shown:
        at = layers.index(_layer_index(column)) / max(1, len(layers) - 1)
        style = {"color": matplotlib.colormaps["viridis"](0.88 * at), "linewidth": 1.6}
        line = "--" if column.startswith("gate_ff_") else "-"
        by_stage = series_by_stage(tables, column)
        for panel, stage in zip(panels, names, strict=True):
            if stage in by_stage:
                one = by_stage[stage]
                panel.plot(one.steps, one.mean, linestyle=line, **style)
    for panel in panels:
        panel.axhline(0, color=MUTED_COLOR, linewidth=0.8)
    _label_stage_panels(panels, names, "tanh of the gate")
    return figure_to_svg(figure, svg_id, f"Gates of {row_name} against steps")


def _layer_index(column: str) -> int:
    end = column.rpartition("_")[2]
    return int(end) if end.isdecimal() else 0


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
