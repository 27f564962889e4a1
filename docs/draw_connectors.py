"""Draw connectors.svg, five ways from an image into the text: python docs/draw_connectors.py."""

from __future__ import annotations

from pathlib import Path

FILE = Path(__file__).with_name("connectors.svg")
GUTTER, PANEL, WIDTH, HEIGHT, PITCH = 134, 300, 1638, 808, 20  # PITCH: from place to place
Points = list[tuple[int, int]]
VISION, LANGUAGE, INK, DAY, DUSK = "#2f6fb3", "#2a8a66", "#222222", "#cfe3f6", "#f6cfc0"
FIRST, SECOND = "#c06c00", "#7c300c"  # the connector; what is of a second image is darker
LAYERS, GATED = (440, 520, 562, 642), (480, 602)  # tops of decoder layers and of what is before two
ROWS = {150: "image", 218: "vision encoder", 258: "patches", 322: "connector", 401: "text"}
ROWS |= {top + 21: f"decoder layer {i}" for i, top in enumerate(LAYERS)}
ROWS |= {top + 12: "gated cross-" for top in GATED} | {top + 29: "attention, sum" for top in GATED}
PANELS = (
    "(a) one token per patch|llava_mlp, linear,|glu, eva, dense"
    "|The text holds a place|for every patch.",
    "(b) fewer tokens|qformer, instruct_qformer, resampler,|avgpool, pixel_shuffle, c_abstractor,"
    "|attention_pool, token_packer|The text stays shorter: every|decoder layer has less to do.",
    "(c) inside the decoder|flamingo, cross_attention|"
    "|One place per image; each stretch|of text looks at its own.",
    "(d) both|mixed||The tokens stand in the text,|which looks at them again.",
    "(e) levels|deepstack||To the tokens in the text more is|added: what earlier blocks saw.",
)
STYLE = """text{font:16px Helvetica,Arial,sans-serif;text-anchor:middle}
.title{font-size:21px;font-weight:bold}.row{text-anchor:end}.key{text-anchor:start}"""


def draw_box(x: int, y: int, width: int, height: int, fill: str, more: str = "") -> str:
    """Return a rectangle."""
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="3" fill="{fill}"{more}/>'


def draw_text(x: int, y: int, words: str, fill: str = INK, kind: str = "") -> str:
    """Return a line of text with its middle at `x`; `kind` is a class of STYLE."""
    return f'<text x="{x}" y="{y}" fill="{fill}" class="{kind}">{words}</text>'


def draw_shape(corners: Points, colour: str, kind: str = "polygon", more: str = "") -> str:
    """Return a shape with these corners, or with kind "polyline" a line."""
    points = " ".join(f"{x},{y}" for x, y in corners)
    return f'<{kind} points="{points}" fill="{colour}"{more}/>'


def draw_arrow(points: Points, colour: str) -> str:
    """Return a line through `points` with a head, which points down or aside."""
    x, y = points[-1]
    way = (x > points[-2][0]) - (x < points[-2][0])  # 1: to the right, -1: to the left, 0: down
    back = x - 8 * way
    sides = [(back, y - 5), (back, y + 5)] if way else [(x - 5, y - 8), (x + 5, y - 8)]
    line = [*points[:-1], (back, y) if way else (x, y - 6)]
    drawn = draw_shape(line, "none", "polyline", f' stroke="{colour}" stroke-width="2"')
    return drawn + draw_shape([(x, y), *sides], colour)


def draw_image(middle: int, sky: str = DAY) -> str:
    """Return a house in the sun, cut into nine patches."""
    x, y = middle - 36, 108
    parts = [draw_box(x, y, 72, 72, sky), draw_box(x, y + 54, 72, 18, "#a9cf95")]
    parts += [f'<circle cx="{x + 13}" cy="{y + 13}" r="7" fill="#f2c230"/>']
    parts += [
        draw_box(x + 28, y + 32, 28, 28, "#d9c3a0"),
        draw_box(x + 38, y + 44, 8, 16, "#8a5a3c"),
    ]
    parts += [draw_shape([(x + 22, y + 34), (x + 42, y + 14), (x + 62, y + 34)], "#a34d3f")]
    for step in (23, 47):
        parts += [draw_box(x + step, y, 2, 72, "white"), draw_box(x, y + step, 72, 2, "white")]
    return "".join(parts)


def draw_connector(
    middle: int, top: int, bottom: int, end: int, words: str, colour: str = FIRST
) -> str:
    """Return a connector from y 292 to `end`; `top` and `bottom` are half of its widths."""
    sides = [(-top, 292), (top, 292), (bottom, end), (-bottom, end)]
    drawn = draw_shape([(middle + x, y) for x, y in sides], colour)
    return drawn + draw_text(middle, (292 + end) // 2 + 5, words, "white")


def draw_image_to_text(middle: int, count: int, words: str) -> str:
    """Return an image on its way through encoder and connector into `count` places of the text."""
    parts = [draw_image(middle), draw_arrow([(middle, 182), (middle, 200)], VISION)]
    parts += [draw_box(middle - 90, 200, 178, 26, VISION), draw_text(middle, 218, "ViT", "white")]
    for x in range(middle - 90, middle + 90, PITCH):
        parts += [
            draw_box(x, 244, 18, 18, VISION),
            draw_arrow([(x + 9, 264), (x + 9, 292)], VISION),
        ]
    half = PITCH * count // 2
    parts += [draw_connector(middle - 1, 89, half - 1, 342, words)]
    ways = range(middle - half + 9, middle + half, PITCH)
    parts += [draw_arrow([(x, 344), (x, 384)], FIRST) for x in ways]
    return "".join([*parts, draw_language_model(middle + 10, "t" + "v" * count + "tt")])


def draw_language_model(middle: int, places: str) -> str:
    """Return the layers and a text, written as t (text), v (visual token), 1 and 2 (place)."""
    x, width = middle - PITCH * len(places) // 2, PITCH * len(places) - 2
    ways = zip([384, *LAYERS], [*LAYERS, 694], strict=True)
    parts = [draw_arrow([(middle, start + 34), (middle, stop)], LANGUAGE) for start, stop in ways]
    for i, place in enumerate(places):
        colour = {"t": LANGUAGE, "v": FIRST, "1": FIRST, "2": SECOND}[place]
        parts += [draw_box(x + PITCH * i, 386, 18, 18, colour)]
        parts += [draw_box(x + PITCH * i + 3, 389, 12, 12, "white")] if place in "12" else []
    return "".join([*parts, *(draw_box(x, top, width, 32, LANGUAGE) for top in LAYERS)])


def draw_attention(x: int, places: int, words: str, colour: str, start: Points) -> str:
    """Return the stretch of text from `x` on, what it looks at, and the way there from `start`."""
    width, side = PITCH * places - 2, start[-1][0]
    stop = x - 2 if side < x else x + width + 2
    parts = [draw_box(x, 408, width, 4, colour)]
    for top in GATED:
        parts += [
            draw_box(x, top, width, 32, colour),
            draw_text(x + width // 2, top + 21, words, "white"),
        ]
        parts += [draw_arrow([*start, (side, top + 16), (stop, top + 16)], colour)]
    return "".join(parts)


def draw_flamingo(middle: int) -> str:
    """Return two images, whose latents stay out of the text, and a place for each."""
    parts = [
        draw_language_model(middle, "tt1ttt2ttt"),
        draw_box(middle - 124, 200, 248, 26, VISION),
    ]
    parts += [draw_text(middle, 218, "ViT", "white")]
    for number, way, sky, colour in ((1, -1, DAY, FIRST), (2, 1, DUSK, SECOND)):
        at = middle + 66 * way
        parts += [draw_image(at, sky), draw_arrow([(at, 182), (at, 200)], VISION)]
        parts += [draw_box(at - 58 + 13 * i, 247, 11, 11, VISION) for i in range(9)]
        parts += [
            draw_arrow([(at, 262), (at, 292)], VISION),
            draw_connector(at, 58, 36, 334, "resampler", colour),
        ]
        parts += [draw_box(at - 29 + PITCH * i, 338, 18, 18, colour) for i in range(3)]
        start = [(at, 357), (at, 368), (middle + 134 * way, 368)]
        parts += [draw_attention(middle + 80 * number - 140, 4, f"image {number}", colour, start)]
    return "".join(parts)


def draw_page() -> str:
    """Return the figure of the page docs/connectors.md as SVG."""
    a, b, c, d, e = middles = [GUTTER + PANEL * i + PANEL // 2 for i in range(5)]
    parts = [f"<style>{STYLE}</style>", draw_box(0, 0, WIDTH, HEIGHT, "white")]
    parts += [draw_text(GUTTER - 6, y, words, kind="row") for y, words in ROWS.items()]
    for middle, words in zip(middles, PANELS, strict=True):
        title, *lines = words.split("|")
        parts += [draw_box(middle - 146, 8, 292, 756, "#fafafa", ' stroke="#cccccc"')]
        parts += [draw_text(middle, 40, title, kind="title")]
        tops = (68, 90) if len(lines) == 4 else (62, 82, 102)
        for y, line in zip((*tops, 718, 740), lines, strict=True):
            parts += [draw_text(middle, y, line, FIRST if y in tops else INK)]
    parts += [draw_image_to_text(a - 10, 9, "one for one"), draw_image_to_text(b - 10, 4, "merge")]
    parts += [draw_flamingo(c), draw_image_to_text(d - 10, 9, "one of (a) or (b)")]
    parts += [
        draw_attention(d - 100, 11, "the image's tokens", FIRST, [(d + 78, 317), (d + 138, 317)]),
        draw_image_to_text(e - 10, 9, "one for one"),
        draw_attention(e - 100, 9, "earlier blocks", SECOND, [(e + 78, 213), (e + 138, 213)]),
    ]
    legend = ((420, VISION, "vision"), (600, FIRST, "connector"), (800, LANGUAGE, "language model"))
    for x, colour, words in legend:
        parts += [draw_box(x, 776, 18, 18, colour), draw_text(x + 26, 791, words, kind="key")]
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">'
    return "\n".join([start, *parts, "</svg>\n"])


if __name__ == "__main__":
    FILE.write_text(draw_page(), encoding="utf-8")
