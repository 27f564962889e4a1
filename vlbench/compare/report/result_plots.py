"""Plots of the rows' accuracies, differences and costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median_low

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

from vlbench.compare.report.analysis import RowResult
from vlbench.compare.report.detectable_difference import UNDETECTABLE
from vlbench.compare.report.question_kinds import QuestionGroup
from vlbench.compare.report.row_costs import pareto_frontier
from vlbench.compare.report.row_pairs import RowPair
from vlbench.compare.report.svg_figure import (
    GRID_COLOR,
    MUTED_COLOR,
    TEXT_COLOR,
    figure_to_svg,
    label_rows,
    labels_height,
    make_subplots,
    plot_style,
    row_style,
    widen_range,
    wrap_label,
)

MAX_PAIRS_DRAWN = 15  # of more pairs, only those of the best row are drawn
MAX_INTERVAL_WIDTH = 0.5  # of what is possible; if most intervals are wider, none is drawn
MIN_ACCURACY_SPAN = 0.2  # of an axis of accuracies
MIN_DIFFERENCE_SPAN = 10.0  # points, of an axis of differences


def say_something(intervals: Iterable[tuple[float, float]], largest_width: float = 1.0) -> bool:
    """Return whether at least half of the intervals are narrow enough to be drawn.

    With two seeds, whose Student's t is 12.7, most reach over the whole axis: a sentence says that
    better than a plot of bars. `largest_width` is that of an interval that covers all values.
    """
    widths = [high - low for low, high in intervals]
    return not widths or median_low(widths) <= MAX_INTERVAL_WIDTH * largest_width


def accuracy_intervals_drawn(rows: Sequence[RowResult]) -> bool:
    """Return whether plots show the intervals of the rows' accuracies."""
    return say_something((row.interval_low, row.interval_high) for row in rows)


def group_intervals_drawn(groups: Sequence[QuestionGroup]) -> bool:
    """Return whether the plot of groups of questions shows intervals."""
    return say_something((low, high) for group in groups for _, low, high in group.row_accuracies)


def difference_intervals_drawn(pairs: Sequence[RowPair]) -> bool:
    """Return whether the differences are known well enough for a plot."""
    differences = [pair.difference for pair in pairs]
    return say_something(((one.interval_low, one.interval_high) for one in differences), 2.0)


@plot_style()
def plot_accuracies(rows: Sequence[RowResult], labels: Mapping[str, str]) -> Markup:
    """Draw each row's accuracy with its interval, and a short stroke for every seed.

    `labels` maps the names of rows to those of the plot, here and below.
    """
    names = [wrap_label(labels[row.name]) for row in rows]
    figure, ((axes,),) = make_subplots(0.75 + labels_height(names))
    has_intervals = accuracy_intervals_drawn(rows)
    for y, row in enumerate(rows):
        style = {**row_style(y), "linestyle": "none"}
        by_seed = row.correct.mean(axis=1)
        axes.plot(by_seed, [y] * len(by_seed), "|", color=MUTED_COLOR, markersize=9)
        errors = _interval_errors(row) if has_intervals else None
        axes.errorbar([row.accuracy], [y], xerr=errors, capsize=3, markersize=7, **style)
    label_rows(axes, names)
    axes.set_xlim(*_accuracy_range(axes.dataLim.intervalx))
    axes.set_xlabel("share of questions answered right")
    return figure_to_svg(figure, "plot-accuracies", "Accuracy of each row with its 95 % interval")


def _interval_errors(row: RowResult) -> list[list[float]]:
    """Return the distances from the accuracy to the ends of its interval, for `errorbar`."""
    return [[row.accuracy - row.interval_low], [row.interval_high - row.accuracy]]


def _accuracy_range(ends: Sequence[float]) -> tuple[float, float]:
    return widen_range(min(ends), max(ends), MIN_ACCURACY_SPAN, floor=-0.02, ceiling=1.02)


def pairs_to_draw(pairs: Sequence[RowPair]) -> list[RowPair]:
    """Return the pairs to draw: all, or those of the best row if there are too many."""
    return [
        pair for pair in pairs if len(pairs) <= MAX_PAIRS_DRAWN or pair.better == pairs[0].better
    ]


@plot_style()
def plot_differences(pairs: Sequence[RowPair], labels: Mapping[str, str]) -> Markup:
    """Draw each pair's difference with its interval and the smallest detectable difference."""
    drawn = pairs_to_draw(pairs)
    names = [_pair_label(labels[pair.better], labels[pair.worse]) for pair in drawn]
    figure, ((axes,),) = make_subplots(0.75 + labels_height(names))
    for y, pair in enumerate(drawn):
        difference = pair.difference
        mean = 100 * difference.mean
        low, high = 100 * difference.interval_low, 100 * difference.interval_high
        axes.errorbar(
            [mean],
            [y],
            xerr=[[mean - low], [high - mean]],
            fmt="o",
            color=TEXT_COLOR,
            markersize=7,
            markerfacecolor=TEXT_COLOR if pair.is_significant else "white",
            capsize=3,
        )
        if difference.smallest_detectable < UNDETECTABLE:
            smallest = 100 * difference.smallest_detectable
            axes.plot([smallest], [y], "|", color="#D55E00", markersize=15)
    axes.axvline(0, color=MUTED_COLOR, linewidth=1)
    label_rows(axes, names)
    axes.set_xlim(*widen_range(axes.dataLim.xmin, axes.dataLim.xmax, MIN_DIFFERENCE_SPAN))
    axes.set_xlabel("percentage points")
    return figure_to_svg(
        figure, "plot-differences", "Difference of each pair of rows with its 95 % interval"
    )


def _pair_label(better: str, worse: str) -> str:
    """Return the labels of a pair, on one line if they fit."""
    line = f"{better} over {worse}"
    return line if len(line) <= 32 else f"{wrap_label(better)}\nover {wrap_label(worse)}"


@plot_style()
def plot_question_groups(groups: Sequence[QuestionGroup], rows: Sequence[RowResult]) -> Markup:
    """Draw every row's accuracy for every group of questions, one band per group."""
    step = 0.8 / max(1, len(rows))
    figure, ((axes,),) = make_subplots(0.75 + len(groups) * max(0.34, 0.11 * len(rows) + 0.12))
    has_intervals = group_intervals_drawn(groups)
    for center, group in enumerate(groups):
        if center % 2:
            axes.axhspan(center - 0.5, center + 0.5, color=GRID_COLOR, alpha=0.35, linewidth=0)
        for index, (accuracy, low, high) in enumerate(group.row_accuracies):
            y = center + (index - (len(rows) - 1) / 2) * step
            style = {**row_style(index), "linestyle": "none"}
            if has_intervals:
                axes.plot([low, high], [y, y], color=style["color"], linewidth=0.9, alpha=0.6)
            axes.plot([accuracy], [y], markersize=4.5, **style)
    label_rows(axes, [wrap_label(f"{group.name} ({group.question_count:,})") for group in groups])
    axes.set_xlim(*_accuracy_range(axes.dataLim.intervalx))
    axes.set_xlabel("share of questions answered right")
    return figure_to_svg(figure, "plot-kinds", "Accuracy of each row by kind of question")


@plot_style()
def plot_costs(rows: Sequence[RowResult]) -> Markup:
    """Draw accuracy against prefill FLOPs and seconds of training, with Pareto frontiers.

    A cost that no row has gets no panel.
    """
    prices = {
        "FLOPs up to the first answer token": [row.budget.get("flops") for row in rows],
        "seconds of the whole run": [row.mean_result("seconds") for row in rows],
    }
    known = {label: values for label, values in prices.items() if any(values)}
    figure, (panels,) = make_subplots(3.3, columns=len(known), sharey=True)
    for axes, (label, values) in zip(panels, known.items(), strict=True):
        _scatter_costs(axes, rows, values)
        axes.set_xlabel(label)
    panels[0].set_ylabel("share answered right")
    panels[0].set_ylim(*_accuracy_range([y for axes in panels for y in axes.dataLim.intervaly]))
    return figure_to_svg(figure, "plot-costs", "Accuracy of each row against FLOPs and seconds")


def _scatter_costs(axes: Axes, rows: Sequence[RowResult], prices: Sequence[float | None]) -> None:
    points = [(price, row.accuracy) for price, row in zip(prices, rows, strict=True) if price]
    frontier = [points[index] for index in pareto_frontier(points)]
    axes.step(*zip(*frontier, strict=True), where="post", color=MUTED_COLOR, linewidth=1)
    has_intervals = accuracy_intervals_drawn(rows)
    for index, (price, row) in enumerate(zip(prices, rows, strict=True)):
        if price:
            style = {**row_style(index), "linestyle": "none", "elinewidth": 0.8, "markersize": 7}
            errors = _interval_errors(row) if has_intervals else None
            axes.errorbar([price], [row.accuracy], yerr=errors, **style)
    if max(points)[0] > 10 * min(points)[0]:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.15)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlim(0, 1.1 * max(points)[0])
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))


@plot_style()
def plot_accuracy_drops(rows: Sequence[RowResult], labels: Mapping[str, str]) -> Markup:
    """Draw the accuracy with the image, with a blank one and with that of another question."""
    names = [wrap_label(labels[row.name]) for row in rows]
    figure, ((axes,),) = make_subplots(0.75 + labels_height(names))
    for y, row in enumerate(rows):
        blank, shuffled = row.mean_result("blank_accuracy"), row.mean_result("shuffled_accuracy")
        known = [value for value in (row.accuracy, blank, shuffled) if value is not None]
        axes.plot([min(known), max(known)], [y, y], color=GRID_COLOR, linewidth=3, zorder=1)
        style = {**row_style(y), "linestyle": "none"}
        axes.plot([row.accuracy], [y], markersize=7, **style)
        if blank is not None:
            axes.plot([blank], [y], "o", color=TEXT_COLOR, markerfacecolor="white", markersize=7)
        if shuffled is not None:
            axes.plot([shuffled], [y], "x", color=TEXT_COLOR, markersize=7)
    label_rows(axes, names)
    axes.set_xlim(*widen_range(0, max(axes.dataLim.intervalx), MIN_ACCURACY_SPAN, 0, 1.02))
    axes.set_xlabel("share of questions answered right")
    return figure_to_svg(
        figure, "plot-drops", "Accuracy with the image, without it, and with another one"
    )
