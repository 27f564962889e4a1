"""Rendered scenes: what a scene holds and how it is painted. Its texts are in `scene_text`.

A scene is a pure function of (stream, seed, index): one to four coloured shapes, each somewhere in
its own quarter of the image, on a plain muted background. Nothing here imports torch.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

SCENE_VERSION = 1  # of images and texts; raise it when either changes
IMAGE_SIDE = 112  # pixels, width and height
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 38, 40),
    "yellow": (232, 184, 0),
    "green": (36, 156, 66),
    "blue": (38, 84, 214),
    "purple": (150, 52, 186),
    "black": (26, 26, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
# Pairs that no training image contains: every colour once, every shape once.
UNSEEN_PAIRS = {
    "red": "heart",
    "yellow": "square",
    "green": "star",
    "blue": "circle",
    "purple": "triangle",
    "black": "cross",
}
SEEN_PAIRS = tuple((c, s) for c in COLOURS for s in SHAPES if UNSEEN_PAIRS[c] != s)
CELL_COUNT = 4  # quarters of an image
EMPTY_CELL = "none"  # the value of both labels of a quarter without an object
_PAINT_SCALE = 2  # painted twice as large, then halved, for smooth edges


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape of a scene."""

    colour: str  # one of COLOURS; empty where a colour has no name (pretraining alone)
    shape: str  # one of SHAPES
    cell: int  # its quarter of the image: 0 top left, 1 top right, 2 and 3 below them
    x: float  # centre, pixels
    y: float
    radius: float  # pixels
    rotation: float  # radians
    painted_colour: tuple[int, int, int]  # the shade of `colour` that is painted

    @property
    def colour_shape(self) -> tuple[str, str]:
        """(colour, shape)."""
        return self.colour, self.shape


@dataclass(frozen=True)
class RenderedScene:
    """A scene as a `LazyImage`: it is painted when it is opened."""

    name: str
    objects: tuple[SceneObject, ...]  # in raster order
    corner_colours: tuple[tuple[int, int, int], ...]  # of the background, interpolated between

    @property
    def labels(self) -> dict[str, str]:
        """Colour and shape of the object in each quarter, EMPTY_CELL without one."""
        names = (colour_label, shape_label)
        labels = {name(cell): EMPTY_CELL for cell in range(CELL_COUNT) for name in names}
        for one in self.objects:
            labels |= {colour_label(one.cell): one.colour, shape_label(one.cell): one.shape}
        return labels

    def open(self) -> Image.Image:
        """Paint the scene, 112 x 112 pixels, RGB."""
        side = IMAGE_SIDE * _PAINT_SCALE
        corners = Image.new("RGB", (2, 2))
        corners.putdata(self.corner_colours)
        canvas = corners.resize((side, side), Image.Resampling.BILINEAR)
        draw = ImageDraw.Draw(canvas)
        for scene_object in self.objects:
            _paint_object(draw, scene_object)
        return canvas.reduce(_PAINT_SCALE)


def colour_label(cell: int) -> str:
    """Return the name of the label for the colour in a quarter."""
    return f"colour of cell {cell}"


def shape_label(cell: int) -> str:
    """Return the name of the label for the shape in a quarter."""
    return f"shape of cell {cell}"


def make_scene(stream: str, seed: int, index: int, has_unseen_pair: bool = False) -> RenderedScene:
    """Make scene `index` of a stream.

    With `has_unseen_pair` exactly one object is of UNSEEN_PAIRS, otherwise none.
    """
    rng = random.Random(f"{stream}/{seed}/{index}/{has_unseen_pair}")
    count = rng.choices((1, 2, 3, 4), (20, 26, 26, 28))[0]
    pairs = _draw_pairs(rng, count, has_unseen_pair)
    cells = sorted(rng.sample(range(4), count))
    objects = tuple(make_object(rng, pair, cell) for pair, cell in zip(pairs, cells, strict=True))
    return RenderedScene(f"scene-{stream}-{seed}-{index}", objects, make_background(rng))


def _draw_pairs(rng: random.Random, count: int, has_unseen_pair: bool) -> list[tuple[str, str]]:
    """Draw (colour, shape) pairs: all different, free, or with a shared shape or colour."""
    plan = rng.choices(("different", "free", "shape", "colour"), (40, 20, 20, 20))[0]
    first = rng.choice(tuple(UNSEEN_PAIRS.items())) if has_unseen_pair else rng.choice(SEEN_PAIRS)
    shared_count = rng.choice((2, 3, 4))
    pairs = [first]
    while len(pairs) < count:
        colour, shape = rng.choice(SEEN_PAIRS)
        if plan == "different" and any(colour == c or shape == s for c, s in pairs):
            continue
        if plan == "shape" and len(pairs) < shared_count and shape != first[1]:
            continue
        if plan == "colour" and len(pairs) < shared_count and colour != first[0]:
            continue
        pairs.append((colour, shape))
    rng.shuffle(pairs)
    return pairs


def make_object(rng: random.Random, colour_shape: tuple[str, str], cell: int) -> SceneObject:
    """Draw an object in its quarter: radius 16 to 25 pixels, any position where it fits."""
    half = IMAGE_SIDE / 2
    radius = rng.uniform(16.0, 25.0)
    slack = half / 2 - radius - 0.5
    x = half / 2 + half * (cell % 2) + rng.uniform(-slack, slack)
    y = half / 2 + half * (cell // 2) + rng.uniform(-slack, slack)
    brightness = rng.uniform(0.86, 1.1)
    red, green, blue = (
        min(255, max(0, round(value * brightness + rng.uniform(-8, 8))))
        for value in COLOURS[colour_shape[0]]
    )
    rotation = rng.uniform(-0.2, 0.2)
    return SceneObject(*colour_shape, cell, x, y, radius, rotation, (red, green, blue))


def make_background(rng: random.Random) -> tuple[tuple[int, int, int], ...]:
    """Draw the corner colours of a muted background.

    It is lighter than every object. Otherwise the contrast that tells shapes apart would change its
    sign with the colour, and a small vision encoder would need far longer to learn it.
    """
    brightness = rng.uniform(190, 243)
    tint = [rng.uniform(-12, 12) for _ in range(3)]
    corners = []
    for _ in range(4):
        shift = rng.uniform(-10, 10)
        red, green, blue = (min(255, max(0, round(brightness + t + shift))) for t in tint)
        corners.append((red, green, blue))
    return tuple(corners)


def _paint_object(draw: ImageDraw.ImageDraw, scene_object: SceneObject) -> None:
    x, y = scene_object.x * _PAINT_SCALE, scene_object.y * _PAINT_SCALE
    radius = scene_object.radius * _PAINT_SCALE
    if scene_object.shape == "circle":
        size = radius * 0.9
        draw.ellipse((x - size, y - size, x + size, y + size), fill=scene_object.painted_colour)
        return
    cos, sin = math.cos(scene_object.rotation) * radius, math.sin(scene_object.rotation) * radius
    outline = [
        (x + u * cos - v * sin, y + u * sin + v * cos) for u, v in _OUTLINES[scene_object.shape]
    ]
    draw.polygon(outline, fill=scene_object.painted_colour)


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
