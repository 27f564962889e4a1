"""Plots of budget curves: accuracy over the logarithm of the budget, all questions and by kind."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from vlbench.compare.report.curve_analysis import BudgetCurve, CurveFindings, MeasuredPoint
from vlbench.compare.report.curve_plan import format_budget
from vlbench.compare.report.result_plots import MIN_ACCURACY_SPAN, say_something
from vlbench.compare.report.svg_figure import (
    MUTED_COLOR,
    TEXT_COLOR,
    figure_to_svg,
    make_subplots,
    plot_style,
    row_style,
    widen_range,
    wrap_label,
)

KIND_COLUMNS = 3  # panels beside each other
MAX_KINDS_DRAWN = 12  # of more kinds, those with the most questions
CROSSING_LEVEL = 0.045  # height of the lowest bar of a crossing, as a share of the axis


def bands_drawn(curves: Sequence[BudgetCurve]) -> bool:
    """Return whether intervals are narrow enough for bands to say something."""
    points = [point for curve in curves for point in curve.points]
    return say_something((point.interval_low, point.interval_high) for point in points)


@plot_style()
def plot_curves(found: CurveFindings) -> Markup:
    """Draw every curve with its band, and a bar for the interval of every crossing."""
    figure, ((axes,),) = make_subplots(3.6)
    has_bands = bands_drawn(found.curves)
    for index, curve in enumerate(found.curves):
        _draw_curve(axes, curve.points, index, has_bands)
    crossings = [one for pair in found.curve_pairs for one in pair.undecided if one.crossings]
    _scale_axes(axes, found)
    for index, crossing in enumerate(crossings):
        level = CROSSING_LEVEL * (1 + index)
        place = {"transform": axes.get_xaxis_transform(), "zorder": 3}
        axes.plot([crossing.low, crossing.high], [level] * 2, color=MUTED_COLOR, lw=2.5, **place)
        axes.plot(crossing.crossings, [level] * len(crossing.crossings), "|", color=TEXT_COLOR,
                  markersize=11, markeredgewidth=2, **place)  # fmt: skip
    axes.set_ylabel("share answered right")
    axes.set_xlabel(found.plan.label)
    return figure_to_svg(figure, "plot-curves", f"Accuracy of each row against {found.plan.label}")


@plot_style()
def plot_curves_by_kind(found: CurveFindings) -> Markup | None:
    """Draw the curves of every kind of question, a panel each; None without kinds."""
    counts = {one.kind: one.question_count for one in found.frontiers if one.kind}
    kinds = sorted(counts, key=lambda kind: -counts[kind])[:MAX_KINDS_DRAWN]
    if not kinds:
        return None
    columns = min(KIND_COLUMNS, len(kinds))
    panel_rows = math.ceil(len(kinds) / columns)
    figure, panels = make_subplots(0.4 + 2.2 * panel_rows, columns, panel_rows, sharey=True)
    drawn = [points for curve in found.curves for points in curve.points_by_kind.values()]
    has_bands = say_something(
        (point.interval_low, point.interval_high) for points in drawn for point in points
    )
    for axes, kind in zip(panels.flat, kinds, strict=False):
        for index, curve in enumerate(found.curves):
            _draw_curve(axes, curve.points_by_kind[kind], index, has_bands)
        axes.set_title(wrap_label(f"{kind} ({counts[kind]:,})", 24))
        axes.set_xlabel(found.plan.label)
    for axes in panels.flat[: len(kinds)]:
        _scale_axes(axes, found)
    ends = [end for axes in panels.flat[: len(kinds)] for end in axes.dataLim.intervaly]
    panels.flat[0].set_ylim(*_accuracy_range(ends))
    for axes in panels.flat[len(kinds) :]:
        axes.set_axis_off()
    for axes in panels[:, 0]:
        axes.set_ylabel("share right")
    return figure_to_svg(
        figure, "plot-curves-kinds", f"Accuracy against {found.plan.label} by kind of question"
    )


def _draw_curve(axes: Axes, points: Sequence[MeasuredPoint], index: int, has_band: bool) -> None:
    style = {**row_style(index), "linewidth": 1.6, "markersize": 6}
    budgets = [point.budget for point in points]
    axes.plot(budgets, [point.accuracy for point in points], **style)
    if has_band:
        low = [point.interval_low for point in points]
        high = [point.interval_high for point in points]
        if len(points) == 1:  # a band of one point has no area
            axes.plot(budgets * 2, [*low, *high], color=style["color"], linewidth=1, alpha=0.6)
        axes.fill_between(budgets, low, high, color=style["color"], alpha=0.16, linewidth=0)


def _scale_axes(axes: Axes, found: CurveFindings) -> None:
    """Make the axis of budgets logarithmic, with a tick at each of them."""
    values = found.plan.values
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(values, [format_budget(value) for value in values])
    axes.set_ylim(*_accuracy_range(axes.dataLim.intervaly))


def _accuracy_range(ends: Sequence[float]) -> tuple[float, float]:
    return widen_range(min(ends), max(ends), MIN_ACCURACY_SPAN, floor=-0.02, ceiling=1.02)
