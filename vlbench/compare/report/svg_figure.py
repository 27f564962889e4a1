"""The style of the page's plots, and figures as inline SVG: the same data give the same bytes."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator

from vlbench.process_settings import ignore_thread_warnings

# Okabe and Ito (2008), distinguishable with color blindness; without yellow, faint on white
ROW_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
ROW_MARKERS = "osD^vPX<"
LINE_STYLES = ("-", "--", "-.", ":")
TEXT_COLOR, MUTED_COLOR, GRID_COLOR = "#1c2028", "#68717e", "#d5dae2"
FIGURE_WIDTH = 7.2  # inches; the page scales a figure to its full width
NARROW_WIDTH = 3.7  # inches, of the second drawing, which telephones show at the same text size
NARROW_LABEL = 15  # characters of a line of a label there
RC_PARAMS = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 10,
    "text.color": TEXT_COLOR,
    "axes.labelcolor": TEXT_COLOR,
    "axes.edgecolor": MUTED_COLOR,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID_COLOR,
    "grid.linewidth": 0.7,
    "xtick.color": TEXT_COLOR,
    "ytick.color": TEXT_COLOR,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",  # text stays text, rendered with the browser's fonts
    "svg.hashsalt": "vlbench",
    "text.parse_math": False,  # a name may contain a dollar sign
}
SVG_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


@contextmanager
def plot_style() -> Iterator[None]:
    """Draw in this style, not in that of the user's matplotlibrc; also usable as a decorator."""
    keep = ("backend", "interactive", "toolbar", "timezone")
    defaults = matplotlib.rcParamsDefault.items()
    style: Any = {key: value for key, value in defaults if not key.startswith(keep)}
    style |= RC_PARAMS
    with matplotlib.rc_context(style):
        yield


def row_style(row_index: int) -> dict[str, Any]:
    """Return color, marker and line style of a row; the first 28 rows all differ."""
    return {
        "color": ROW_COLORS[row_index % len(ROW_COLORS)],
        "marker": ROW_MARKERS[row_index % len(ROW_MARKERS)],
        "linestyle": LINE_STYLES[row_index % len(LINE_STYLES)],
    }


def make_subplots(
    height: float, columns: int = 1, rows: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """Return a figure of `FIGURE_WIDTH` x `height` inches and its axes `[rows][columns]`."""
    figure = Figure(figsize=(FIGURE_WIDTH, height))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def figure_to_svg(figure: Figure, svg_id: str, alt_text: str) -> Markup:
    """Return a figure drawn twice: an <svg class="wide">, and one for telephones.

    Each scales to its box, the stylesheet shows one of them, and all ids begin with `svg_id`. The
    second has its panels one below another, and changes `figure`.
    """
    wide = svg_element(figure, svg_id, alt_text, "wide")
    _make_narrow(figure)
    return wide + svg_element(figure, f"{svg_id}-narrow", alt_text, "narrow")


def _make_narrow(figure: Figure) -> None:
    """Put the panels one below another and break the labels of rows into shorter lines."""
    for axes in figure.axes:
        if not axes.axison:
            axes.remove()  # the empty place of a grid
    panels = figure.axes
    width, height = figure.get_size_inches()
    panel_rows = len({axes.get_subplotspec().rowspan.start for axes in panels})  # type: ignore[union-attr]
    heights = []
    grid = figure.add_gridspec(len(panels), 1)
    for index, panel in enumerate(panels):
        labels = [label.get_text() for label in panel.get_yticklabels()]
        if isinstance(panel.yaxis.get_major_locator(), FixedLocator):
            narrow = [wrap_label(" ".join(label.split()), NARROW_LABEL) for label in labels]
            panel.set_yticks(panel.get_yticks(), narrow)
            height += max(0.0, labels_height(narrow) - labels_height(labels))
        panel.tick_params(axis="both", labelleft=True, labelbottom=True)
        panel.set_subplotspec(grid[index])
        heights.append(height / panel_rows)
    figure.set_size_inches(min(width, NARROW_WIDTH), sum(heights))


def svg_element(figure: Figure, svg_id: str, alt_text: str, css_class: str) -> Markup:
    """Return a figure as one <svg>; all ids in it begin with `svg_id`."""
    file = io.StringIO()
    with ignore_thread_warnings():  # that matplotlib's font lacks Chinese: the browser's has it
        figure.savefig(file, format="svg", metadata=SVG_METADATA, transparent=True)
    text = file.getvalue()
    head, _, body = text[text.index("<svg") :].partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None  # matplotlib always writes one
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{svg_id}-", body).strip()
    return Markup(  # nosec B704: matplotlib escapes its texts, the label is escaped here
        f'<svg id="{svg_id}" class="{css_class}" {box[0]} xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'aria-label="{escape(alt_text)}">{body}'
    )


def legend_marker(row_index: int) -> Markup:
    """Return the marker of a row on a segment of its line, for legends."""
    with plot_style():
        figure = Figure(figsize=(0.5, 0.2))
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.add_line(Line2D([0.05, 0.5, 0.95], [0.5] * 3, markevery=[1], **row_style(row_index)))
        axes.set_axis_off()
        return svg_element(figure, f"row-{row_index}", "", "marker")


def wrap_label(name: str, width: int = 32) -> str:
    """Return a long name in at most three lines for an axis."""
    lines = textwrap.wrap(name, width, max_lines=3, placeholder=" \u2026")
    return "\n".join(lines) or name


def label_rows(axes: Axes, labels: list[str]) -> None:
    """Label the positions 0, 1, ... of the y axis, the first on top; labels may have lines."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)


def labels_height(labels: list[str], line_height: float = 0.17, padding: float = 0.14) -> float:
    """Return the height in inches that the labels of the y axis need."""
    return sum(padding + line_height * (1 + label.count("\n")) for label in labels)


def widen_range(
    low: float, high: float, span: float, floor: float = -math.inf, ceiling: float = math.inf
) -> tuple[float, float]:
    """Return a range around low to high that is at least `span` wide, with 5 % of margin.

    Values that hardly differ then look so. The range is moved, not cut, to stay in floor..ceiling.
    """
    margin = max(0.05 * (high - low), (span - (high - low)) / 2)
    low, high = low - margin, high + margin
    if low < floor:
        low, high = floor, high + floor - low
    if high > ceiling:
        low, high = max(floor, low + ceiling - high), ceiling
    return low, high
