"""Draw tiles.svg, three ways from a picture to image positions: python docs/draw_tiles.py.

The order of the positions is that of `vlbench.data.view_layout`, for views of 2 x 2 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlbench.data.image_tiling import ImageTiling, TiledImage
from vlbench.data.sample import LazyImage
from vlbench.data.view_layout import ViewLayout, ViewSettings

FILE = Path(__file__).with_name("tiles.svg")
TILE, BOX, PITCH, WIDTH, PANEL = 62, 16, 19, 790, 214  # BOX: a visual token; PITCH: to the next
SIDE, TOKENS = 112, (2, 2)  # of a view: pixels, rows and columns of tokens
COLOURS = ("#2f6fb3", "#c06c00", "#2a8a66", "#8a4fa3")  # of tiles
THUMBNAIL, PADDING, NEWLINE = "#68717e", "#e6e9ee", "#222222"
STYLE = "text{font:15px Helvetica,Arial,sans-serif;fill:#1c2028}.title{font-weight:bold}"


@dataclass(frozen=True)
class Panel:
    """A picture and how it is tiled."""

    title: str
    size: tuple[int, int]  # width and height, pixels
    settings: ViewSettings
    words: str  # what is said below


PANELS = (
    Panel(
        "grid: llava_next, tags: newline",
        (224, 160),
        ViewSettings(ImageTiling(4), "newline"),
        "The thumbnail, then row by row of all tiles; a learned newline (dark) ends each row. "
        "Padding is left out.",
    ),
    Panel(
        "grid: internvl, tags: none",
        (448, 112),
        ViewSettings(ImageTiling(4, "internvl"), "none"),
        "View after view, the thumbnail last. The picture is squashed onto its grid: no padding.",
    ),
    Panel(
        "grid: internvl, tags: numbered",
        (224, 224),
        ViewSettings(ImageTiling(4, "internvl"), "numbered"),
        "The same with a text before each view: <tile_1> and so on (NVLM).",
    ),
)


@dataclass(frozen=True)
class PaintedImage:
    """An image of which only the size is known."""

    name: str = "painted"

    def open(self):  # never called: a layout needs no pixels
        raise NotImplementedError


def draw_box(x: float, y: float, width: float, height: float, fill: str, more: str = "") -> str:
    """Return a rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"{more}/>'


def draw_text(x: float, y: float, words: str, kind: str = "") -> str:
    """Return a line of text that begins at `x`; `kind` is a class of STYLE."""
    told = words.replace("<", "&lt;").replace(">", "&gt;")
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{told}</text>'


def tile_panel(panel: Panel) -> tuple[ViewLayout, TiledImage]:
    """Return the layout of a panel, and its picture with grid and views."""
    layout = ViewLayout(panel.settings, SIDE, TOKENS[0] * TOKENS[1], TOKENS)
    tiling, image = panel.settings.tiling, PaintedImage()
    grid = tiling.choose_grid(*panel.size, SIDE)
    picture: LazyImage = image
    return layout, TiledImage(picture, panel.size, grid, tiling.list_views(grid))


def draw_grid(panel: Panel, image: TiledImage, top: int) -> str:
    """Return the picture on its grid: a colour for each tile, grey where it is padded."""
    (rows, columns), left = image.grid, 12
    parts = [draw_box(left, top, columns * TILE, rows * TILE, PADDING)]
    width, height = panel.settings.tiling.content_size(*panel.size, image.grid, SIDE)
    scale, canvas = TILE / SIDE, (columns * SIDE, rows * SIDE)
    x, y = ((all_ - part) / 2 for all_, part in zip(canvas, (width, height), strict=True))
    for row in range(rows):
        for column in range(columns):
            edges = [max(x, column * SIDE), max(y, row * SIDE)]
            ends = [min(x + width, (column + 1) * SIDE), min(y + height, (row + 1) * SIDE)]
            at = [left + edges[0] * scale, top + edges[1] * scale]
            size = [(end - edge) * scale for end, edge in zip(ends, edges, strict=True)]
            parts += [draw_box(*at, *size, COLOURS[row * columns + column], ' stroke="white"')]
    if None in image.views:
        parts += [draw_box(left + columns * TILE + 18, top, TILE, TILE, THUMBNAIL)]
        parts += [draw_text(left + columns * TILE + 18, top + TILE + 18, "thumbnail")]
    return "".join(parts)


def draw_positions(layout: ViewLayout, image: TiledImage, left: int, top: int) -> str:
    """Return the image positions in their order, a line of them ending at each newline or view."""
    per_view, tags = layout.tokens_per_view, layout.view_tags(image)
    parts, x, y = [], left, top
    for number, token in enumerate(layout.order_tokens(image)):
        view = image.views[token // per_view] if token >= 0 else None
        if tags and number % per_view == 0:
            tag = tags[number // per_view]
            parts += [draw_text(x, y + 13, tag)]
            x += 8 * len(tag) + 6
        index = 0 if view is None else view[0] * image.grid[1] + view[1]
        colour = THUMBNAIL if view is None else COLOURS[index]
        parts += [draw_box(x, y, BOX, BOX, NEWLINE if token < 0 else colour, ' rx="2"')]
        x += PITCH
        ends_view = layout.settings.has_newline is False and number % per_view == per_view - 1
        whole = layout.settings.has_newline and image.views[0] is None and number == per_view - 1
        if token < 0 or whole or (tags and ends_view):
            x, y = left, y + PITCH + 2
    return "".join(parts)


def draw() -> str:
    """Return the figure as SVG."""
    parts = [f"<style>{STYLE}</style>", draw_box(0, 0, WIDTH, PANEL * len(PANELS), "white")]
    for number, panel in enumerate(PANELS):
        top = number * PANEL
        layout, image = tile_panel(panel)
        count = len(layout.order_tokens(image))
        told = f"{panel.title}: {panel.size[0]} x {panel.size[1]} pixels, {count} positions"
        parts += [draw_text(12, top + 24, told, "title"), draw_grid(panel, image, top + 40)]
        parts += [draw_positions(layout, image, 390, top + 40)]
        parts += [draw_text(12, top + PANEL - 20, panel.words)]
    box = f'viewBox="0 0 {WIDTH} {PANEL * len(PANELS)}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box}>{"".join(parts)}</svg>\n'


if __name__ == "__main__":
    FILE.write_text(draw(), encoding="utf-8")
