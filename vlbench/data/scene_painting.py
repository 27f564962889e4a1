"""The painter of rendered scenes: a background, shapes, letters and dots, with smooth edges.

Everything is drawn twice as large and then halved. A picture takes about half a millisecond.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

_PAINT_SCALE = 2  # painted twice as large, then halved, for smooth edges
_DOT_RADIUS = 2.2  # pixels
_STROKE_WIDTH = 0.4  # of a letter, in units of half its height
_LIGHT_DOT, _DARK_DOT = (250, 250, 250), (26, 26, 30)
Colour = tuple[int, int, int]


class SceneCanvas:
    """A picture while it is painted."""

    def __init__(self, enlarged: Image.Image) -> None:
        self._enlarged = enlarged
        self.draw = ImageDraw.Draw(enlarged)

    def finish(self) -> Image.Image:
        """Return the picture at its size, RGB."""
        return self._enlarged.reduce(_PAINT_SCALE)


def paint_background(corner_colours: Sequence[Colour], side: int) -> SceneCanvas:
    """Begin a square picture of `side` pixels whose ground runs between four corner colours."""
    corners = Image.new("RGB", (2, 2))
    corners.putdata(corner_colours)
    enlarged = side * _PAINT_SCALE
    return SceneCanvas(corners.resize((enlarged, enlarged), Image.Resampling.BILINEAR))


def paint_shape(
    canvas: SceneCanvas,
    shape: str,
    x: float,
    y: float,
    radius: float,
    rotation: float,
    colour: Colour,
) -> None:
    """Paint a shape or a letter.

    Args:
        canvas: The picture.
        shape: One of the shapes of `scene_world`, or a letter of LETTERS.
        x: Its centre, pixels from the left.
        y: Its centre, pixels from the top.
        radius: Pixels; half the height of a letter.
        rotation: Radians.
        colour: RGB.
    """
    x, y, radius = x * _PAINT_SCALE, y * _PAINT_SCALE, radius * _PAINT_SCALE
    cos, sin = math.cos(rotation) * radius, math.sin(rotation) * radius

    def place(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in points]

    if shape in LETTER_STROKES:
        width = round(_STROKE_WIDTH * radius)
        for stroke in LETTER_STROKES[shape]:
            canvas.draw.line(place(stroke), fill=colour, width=width, joint="curve")
    elif shape == "circle":
        size = radius * 0.9
        canvas.draw.ellipse((x - size, y - size, x + size, y + size), fill=colour)
    else:
        canvas.draw.polygon(place(_OUTLINES[shape]), fill=colour)


def paint_dot(canvas: SceneCanvas, x: float, y: float, is_dark: bool) -> None:
    """Paint a small dot, 4 to 5 pixels wide."""
    x, y, size = x * _PAINT_SCALE, y * _PAINT_SCALE, _DOT_RADIUS * _PAINT_SCALE
    fill = _DARK_DOT if is_dark else _LIGHT_DOT
    canvas.draw.ellipse((x - size, y - size, x + size, y + size), fill=fill)


def _heart_outline() -> list[tuple[float, float]]:
    points = []
    for step in range(36):
        t = step * math.pi / 18
        high = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((16 * math.sin(t) ** 3 / 17, -(high + 2.5) / 17))
    return points


def _star_outline() -> list[tuple[float, float]]:
    points = []
    for step in range(10):
        radius = 1.0 if step % 2 == 0 else 0.42
        angle = step * math.pi / 5 - math.pi / 2
        points.append((radius * math.cos(angle), radius * math.sin(angle) + 0.05))
    return points


def _cross_outline(arm: float = 0.3) -> list[tuple[float, float]]:
    corner = [(-arm, -0.95), (arm, -0.95), (arm, -arm)]
    points = []
    for _ in range(4):
        points += corner
        corner = [(-v, u) for u, v in corner]  # a quarter turn
    return points


# Corners of the shapes in units of the radius, y downwards.
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)],
    "triangle": [(0.0, -0.95), (0.95, 0.75), (-0.95, 0.75)],
    "star": _star_outline(),
    "cross": _cross_outline(),
    "heart": _heart_outline(),
}


def _round_stroke() -> list[tuple[float, float]]:
    turns = [step * math.pi / 10 for step in range(21)]
    return [(0.68 * math.cos(turn), 0.85 * math.sin(turn)) for turn in turns]


# The strokes of letters in units of half their height, y downwards. Few letters, none of which
# looks like another: what is asked is whether they are seen, not how well handwriting is read.
LETTER_STROKES: dict[str, list[list[tuple[float, float]]]] = {
    "A": [[(-0.7, 0.85), (0.0, -0.85), (0.7, 0.85)], [(-0.42, 0.3), (0.42, 0.3)]],
    "E": [
        [(0.6, -0.8), (-0.5, -0.8), (-0.5, 0.8), (0.6, 0.8)],
        [(-0.5, 0.0), (0.45, 0.0)],
    ],
    "H": [
        [(-0.6, -0.9), (-0.6, 0.9)],
        [(0.6, -0.9), (0.6, 0.9)],
        [(-0.6, 0.0), (0.6, 0.0)],
    ],
    "L": [[(-0.5, -0.9), (-0.5, 0.8), (0.6, 0.8)]],
    "O": [_round_stroke()],
    "T": [[(-0.75, -0.8), (0.75, -0.8)], [(0.0, -0.8), (0.0, 0.9)]],
    "V": [[(-0.7, -0.9), (0.0, 0.8), (0.7, -0.9)]],
    "X": [[(-0.65, -0.85), (0.65, 0.85)], [(0.65, -0.85), (-0.65, 0.85)]],
}
LETTERS = "".join(LETTER_STROKES)
