"""The look of the page's plots, and a plot as SVG inside of HTML: same numbers, same bytes."""

from __future__ import annotations

import io
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

# Okabe and Ito (2008), told apart by every kind of colour vision; without yellow, faint on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX<"
LINES = ("-", "--", "-.", ":")
INK, FAINT, EDGE = "#1c2028", "#68717e", "#d5dae2"
WIDTH = 7.2  # inches of 72 units: what the page shows at its full width
STYLE = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": EDGE,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",  # text stays text: the browser finds the letters
    "svg.hashsalt": "vlbench",
    "text.parse_math": False,  # a name may hold a dollar
}
NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


@contextmanager
def styled() -> Iterator[None]:
    """Draw in our style, whatever the user's matplotlibrc says; it works as a decorator."""
    keep = ("backend", "interactive", "toolbar", "timezone")
    defaults = matplotlib.rcParamsDefault.items()
    style: Any = {key: value for key, value in defaults if not key.startswith(keep)}
    style |= STYLE
    with matplotlib.rc_context(style):
        yield


def look(index: int) -> dict[str, Any]:
    """Return colour, marker and line of the row with this index: no two of 28 are alike."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index % len(LINES)],
    }


def canvas(height: float, columns: int = 1, rows: int = 1, **options: Any) -> tuple[Figure, Any]:
    """Return a figure of WIDTH x `height` inches and its axes `[rows][columns]`."""
    figure = Figure(figsize=(WIDTH, height))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def svg(figure: Figure, key: str, alt: str) -> Markup:
    """Return a figure as an <svg> that fills its box; ids begin with `key`, unique in the page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=NO_METADATA, transparent=True)
    text = file.getvalue()
    head, _, body = text[text.index("<svg") :].partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None  # matplotlib always writes one
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{key}-", body).strip()
    return Markup(
        f'<svg id="{key}" {box[0]} xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{escape(alt)}">{body}'
    )


def swatch(index: int) -> Markup:
    """Return the marker of a row on a piece of its line, for legends."""
    with styled():
        figure = Figure(figsize=(0.5, 0.2))
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.add_line(Line2D([0.05, 0.5, 0.95], [0.5] * 3, markevery=[1], **look(index)))
        axes.set_axis_off()
        return svg(figure, f"row-{index}", "")


def wrapped(name: str, width: int = 32) -> str:
    """Return a long name in at most three lines for an axis."""
    lines = textwrap.wrap(name, width, max_lines=3, placeholder=" \u2026")
    return "\n".join(lines) or name


def named(axes: Axes, names: list[str]) -> None:
    """Name the places 0, 1, ... of the y axis, the first one on top; names may have lines."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)


def height_of(names: list[str], line: float = 0.17, pad: float = 0.14) -> float:
    """Return the inches that named places need."""
    return sum(pad + line * (1 + name.count("\n")) for name in names)
