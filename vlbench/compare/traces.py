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

from vlbench.compare.curves import Series, Table, columns, series, stages
from vlbench.compare.figure import FAINT, WIDTH, canvas, look, styled, svg, wrapped
from vlbench.compare.insides import Inside

STEEP = 8  # losses that fall to less than a part in this are drawn on a logarithmic axis
ACROSS = 3  # small plots beside one another


@styled()
def losses(tables: Mapping[str, Sequence[Table]], order: Sequence[str]) -> Markup:
    """Draw held-out losses (thick) and training losses (thin) of rows, a panel for each stage.

    `order` names all rows: the place of a row gives its look.
    """
    names = stages([table for found in tables.values() for table in found])
    figure, (panels,) = canvas(3.4, columns=max(1, len(names)))
    for row, found in tables.items():
        style = look(order.index(row))
        trained, held_out = series(found, "loss"), series(found, "held_out_loss")
        for panel, stage in zip(panels, names, strict=False):
            if stage in trained:
                one = trained[stage]
                panel.plot(one.steps, one.mean, color=style["color"], linewidth=0.7, alpha=0.55)
            if stage in held_out:
                _banded(panel, held_out[stage], {**style, "markersize": 4.5, "linewidth": 1.8})
    for panel in panels:
        low, high = panel.dataLim.intervaly
        if 0 < low and high > STEEP * low and math.isfinite(high):
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
            panel.yaxis.set_minor_formatter(NullFormatter())
    _stages(panels, names, "loss")
    return svg(figure, "plot-losses", "Losses of each row against steps, stage by stage")


def _banded(axes: Axes, one: Series, style: dict[str, Any]) -> None:
    axes.plot(one.steps, one.mean, **style)
    axes.fill_between(one.steps, one.low, one.high, color=style["color"], alpha=0.18, linewidth=0)


def _stages(panels: Sequence[Axes], names: Sequence[str], label: str) -> None:
    """Name the stages; the axes between them are their borders."""
    for panel, stage in zip(panels, names, strict=False):
        panel.set_title(wrapped(stage, 24))
        panel.set_xlabel("step of the stage")
    panels[0].set_ylabel(label)


@styled()
def gates(found: Sequence[Table], key: str, row: str) -> Markup | None:
    """Draw the gates of a row against steps, early layers dark; None if it has none."""
    shown = columns(found, "gate_")
    if not shown:
        return None
    names = stages(found)
    figure, (panels,) = canvas(2.9, columns=len(names), sharey=True)
    layers = sorted({_layer(column) for column in shown})
    for column in shown:
        at = layers.index(_layer(column)) / max(1, len(layers) - 1)
        style = {"color": matplotlib.colormaps["viridis"](0.88 * at), "linewidth": 1.6}
        line = "--" if column.startswith("gate_ff_") else "-"
        by_stage = series(found, column)
        for panel, stage in zip(panels, names, strict=True):
            if stage in by_stage:
                one = by_stage[stage]
                panel.plot(one.steps, one.mean, linestyle=line, **style)
    for panel in panels:
        panel.axhline(0, color=FAINT, linewidth=0.8)
    _stages(panels, names, "tanh of the gate")
    return svg(figure, key, f"Gates of {row} against steps")


def _layer(column: str) -> int:
    end = column.rpartition("_")[2]
    return int(end) if end.isdecimal() else 0


@styled()
def tokens(found: Sequence[Inside], order: Sequence[str]) -> Markup:
    """Draw how much each visual token of each row matters, against an even share."""
    down = math.ceil(len(found) / ACROSS)
    across = min(ACROSS, len(found))
    figure = Figure(
        figsize=(WIDTH * across / ACROSS if across > 1 else WIDTH / 2, 0.3 + 1.9 * down)
    )
    panels = figure.subplots(down, across, squeeze=False).flat
    for inside, panel in zip(found, panels, strict=False):
        count = len(inside.tokens)
        colour = look(order.index(inside.row))["color"]
        panel.stairs(inside.tokens, fill=True, color=colour)
        panel.axhline(1 / max(1, count), color=FAINT, linewidth=1, linestyle="--")
        panel.set_title(f"{wrapped(inside.row, 24)}\n{inside.effective:.1f} of {count:,}")
        panel.set_xlabel("visual token")
        panel.grid(axis="x", visible=False)
    for panel in panels:  # those that are left over
        panel.set_axis_off()
    return svg(figure, "plot-tokens", "Share of each visual token in the answers, row by row")
