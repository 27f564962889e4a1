"""Plots of what rows answered and what they cost."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

from vlbench.compare.costs import frontier
from vlbench.compare.figure import (
    EDGE,
    FAINT,
    INK,
    canvas,
    height_of,
    look,
    named,
    styled,
    svg,
    wrapped,
)
from vlbench.compare.findings import Kind, Pair, Row

ALL_PAIRS = 15  # more are not drawn: then the best row is drawn against each other one


@styled()
def accuracies(rows: Sequence[Row]) -> Markup:
    """Draw each row's accuracy with its interval, and a small point for every seed."""
    names = [wrapped(row.name) for row in rows]
    figure, ((axes,),) = canvas(0.75 + height_of(names))
    for place, row in enumerate(rows):
        style = {**look(place), "linestyle": "none"}
        by_seed = row.right.mean(axis=1)
        axes.plot(by_seed, [place] * len(by_seed), "|", color=FAINT, markersize=9)
        reach = [[row.accuracy - row.low], [row.high - row.accuracy]]
        axes.errorbar([row.accuracy], [place], xerr=reach, capsize=3, markersize=7, **style)
    named(axes, names)
    axes.set_xlabel("share of questions answered right")
    return svg(figure, "plot-accuracies", "Accuracy of each row with its 95 % interval")


def drawn(pairs: Sequence[Pair]) -> list[Pair]:
    """Return the pairs that are drawn: all, or those of the best row if they are too many."""
    return [pair for pair in pairs if len(pairs) <= ALL_PAIRS or pair.better == pairs[0].better]


@styled()
def differences(pairs: Sequence[Pair]) -> Markup:
    """Draw the difference of each pair with its interval, and what the design would have found."""
    shown = drawn(pairs)
    names = [_both(pair) for pair in shown]
    figure, ((axes,),) = canvas(0.75 + height_of(names))
    for place, pair in enumerate(shown):
        mean, low, high = (
            100 * x for x in (pair.difference.mean, pair.difference.low, pair.difference.high)
        )
        axes.errorbar(
            [mean],
            [place],
            xerr=[[mean - low], [high - mean]],
            fmt="o",
            color=INK,
            markersize=7,
            markerfacecolor=INK if pair.clear else "white",
            capsize=3,
        )
        axes.plot([100 * pair.difference.detectable], [place], "|", color="#D55E00", markersize=15)
    axes.axvline(0, color=FAINT, linewidth=1)
    named(axes, names)
    axes.set_xlabel("points (hundredths of accuracy)")
    return svg(figure, "plot-differences", "Difference of each pair of rows with its 95 % interval")


def _both(pair: Pair) -> str:
    """Return the names of a pair, on one line if they fit."""
    line = f"{pair.better} over {pair.worse}"
    return line if len(line) <= 32 else f"{wrapped(pair.better)}\nover {wrapped(pair.worse)}"


@styled()
def kinds(found: Sequence[Kind], rows: Sequence[Row]) -> Markup:
    """Draw every row's accuracy for every kind of question, one band per kind."""
    step = 0.8 / max(1, len(rows))
    figure, ((axes,),) = canvas(0.75 + len(found) * max(0.34, 0.11 * len(rows) + 0.12))
    for place, kind in enumerate(found):
        if place % 2:
            axes.axhspan(place - 0.5, place + 0.5, color=EDGE, alpha=0.35, linewidth=0)
        for index, (accuracy, low, high) in enumerate(kind.found):
            y = place + (index - (len(rows) - 1) / 2) * step
            style = {**look(index), "linestyle": "none"}
            axes.plot([low, high], [y, y], color=style["color"], linewidth=0.9, alpha=0.6)
            axes.plot([accuracy], [y], markersize=4.5, **style)
    named(axes, [wrapped(f"{kind.name} ({kind.number:,})") for kind in found])
    axes.set_xlabel("share of questions answered right")
    return svg(figure, "plot-kinds", "Accuracy of each row by kind of question")


@styled()
def costs(rows: Sequence[Row]) -> Markup:
    """Draw accuracy against what a row costs to answer and to train, with the frontier of each."""
    figure, ((answering, training),) = canvas(3.3, columns=2, sharey=True)
    _scatter(answering, rows, [row.budget.get("flops") for row in rows])
    answering.set_xlabel("FLOPs up to the first answer token")
    answering.set_ylabel("share answered right")
    _scatter(training, rows, [row.mean("seconds") for row in rows])
    training.set_xlabel("seconds of the whole run")
    return svg(figure, "plot-costs", "Accuracy of each row against FLOPs and seconds")


def _scatter(axes: Axes, rows: Sequence[Row], prices: Sequence[float | None]) -> None:
    points = [(price, row.accuracy) for price, row in zip(prices, rows, strict=True) if price]
    best = [points[index] for index in frontier(points)]
    if best:
        axes.step(*zip(*best, strict=True), where="post", color=FAINT, linewidth=1)
    for index, (price, row) in enumerate(zip(prices, rows, strict=True)):
        if price:
            style = {**look(index), "linestyle": "none"}
            reach = [[row.accuracy - row.low], [row.high - row.accuracy]]
            axes.errorbar(
                [price], [row.accuracy], yerr=reach, elinewidth=0.8, markersize=7, **style
            )
    if points and max(points)[0] > 10 * min(points)[0]:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.margins(x=0.15)


@styled()
def drops(rows: Sequence[Row]) -> Markup:
    """Draw the accuracy with the picture, with another one and without any, a line per row."""
    names = [wrapped(row.name) for row in rows]
    figure, ((axes,),) = canvas(0.75 + height_of(names))
    for place, row in enumerate(rows):
        blank, exchanged = row.mean("blank_accuracy"), row.mean("shuffled_accuracy")
        known = [value for value in (row.accuracy, blank, exchanged) if value is not None]
        axes.plot([min(known), max(known)], [place, place], color=EDGE, linewidth=3, zorder=1)
        style = {**look(place), "linestyle": "none"}
        axes.plot([row.accuracy], [place], markersize=7, **style)
        if blank is not None:
            axes.plot([blank], [place], "o", color=INK, markerfacecolor="white", markersize=7)
        if exchanged is not None:
            axes.plot([exchanged], [place], "x", color=INK, markersize=7)
    named(axes, names)
    axes.set_xlim(left=0)
    axes.set_xlabel("share of questions answered right")
    return svg(figure, "plot-drops", "Accuracy with the picture, without it, and with another one")
