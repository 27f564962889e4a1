"""The rendered world: what a scene holds and how it is painted. Its words are in `scene_text`.

A scene is a pure function of (stream, seed, index): one to four coloured shapes, each somewhere in
its own quarter of the picture, on a plain muted ground. Nothing here imports torch.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

SCENE_VERSION = 1  # of the world: pictures and words; raise it when either changes
IMAGE_SIDE = 112  # pixels, both ways
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 38, 40),
    "yellow": (232, 184, 0),
    "green": (36, 156, 66),
    "blue": (38, 84, 214),
    "purple": (150, 52, 186),
    "black": (26, 26, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
# Pairs that no training picture holds: every colour once, every shape once.
UNSEEN_PAIRS = {
    "red": "heart",
    "yellow": "square",
    "green": "star",
    "blue": "circle",
    "purple": "triangle",
    "black": "cross",
}
SEEN_PAIRS = tuple((c, s) for c in COLOURS for s in SHAPES if UNSEEN_PAIRS[c] != s)
_PAINT_SCALE = 2  # painted twice as large, then halved: smooth edges


@dataclass(frozen=True)
class SceneObject:
    """One object; `cell` is its quarter: 0 top left, 1 top right, 2 and 3 below them."""

    colour: str  # one of COLOURS; empty where a colour has no name (pretraining alone)
    shape: str
    cell: int
    x: float  # centre, pixels
    y: float
    radius: float  # pixels
    rotation: float  # radians
    painted_colour: tuple[int, int, int]  # the colour as painted

    @property
    def colour_shape(self) -> tuple[str, str]:
        """Give (colour, shape)."""
        return self.colour, self.shape


@dataclass(frozen=True)
class RenderedScene:
    """A picture of the world; a `Picture`: it has a name and can be opened."""

    name: str
    objects: tuple[SceneObject, ...]  # in raster order
    corner_colours: tuple[tuple[int, int, int], ...]  # the four corners' colours

    def open(self) -> Image.Image:
        """Paint the scene, [112, 112] RGB."""
        side = IMAGE_SIDE * _PAINT_SCALE
        corners = Image.new("RGB", (2, 2))
        corners.putdata(self.corner_colours)
        canvas = corners.resize((side, side), Image.Resampling.BILINEAR)
        draw = ImageDraw.Draw(canvas)
        for thing in self.objects:
            _paint_object(draw, thing)
        return canvas.reduce(_PAINT_SCALE)


def make_scene(stream: str, seed: int, index: int, has_unseen_pair: bool = False) -> RenderedScene:
    """Make scene `index` of a stream.

    `unseen` puts exactly one object of an unseen pair into it; without it there is none.
    """
    rng = random.Random(f"{stream}/{seed}/{index}/{has_unseen_pair}")
    count = rng.choices((1, 2, 3, 4), (20, 26, 26, 28))[0]
    pairs = _draw_pairs(rng, count, has_unseen_pair)
    cells = sorted(rng.sample(range(4), count))
    things = tuple(make_object(rng, pair, cell) for pair, cell in zip(pairs, cells, strict=True))
    return RenderedScene(f"scene-{stream}-{seed}-{index}", things, make_background(rng))


def _draw_pairs(rng: random.Random, count: int, has_unseen_pair: bool) -> list[tuple[str, str]]:
    """Draw the objects: all different, free, or several that share a shape or a colour."""
    plan = rng.choices(("different", "free", "shape", "colour"), (40, 20, 20, 20))[0]
    first = rng.choice(tuple(UNSEEN_PAIRS.items())) if has_unseen_pair else rng.choice(SEEN_PAIRS)
    alike = rng.choice((2, 3, 4))
    pairs = [first]
    while len(pairs) < count:
        colour, shape = rng.choice(SEEN_PAIRS)
        if plan == "different" and any(colour == c or shape == s for c, s in pairs):
            continue
        if plan == "shape" and len(pairs) < alike and shape != first[1]:
            continue
        if plan == "colour" and len(pairs) < alike and colour != first[0]:
            continue
        pairs.append((colour, shape))
    rng.shuffle(pairs)
    return pairs


def make_object(rng: random.Random, colour_shape: tuple[str, str], cell: int) -> SceneObject:
    """Place an object in its quarter: any size that is easy to see, any place where it fits."""
    half = IMAGE_SIDE / 2
    radius = rng.uniform(16.0, 25.0)
    slack = half / 2 - radius - 0.5
    x = half / 2 + half * (cell % 2) + rng.uniform(-slack, slack)
    y = half / 2 + half * (cell // 2) + rng.uniform(-slack, slack)
    light = rng.uniform(0.86, 1.1)
    shade = tuple(
        min(255, max(0, round(value * light + rng.uniform(-8, 8))))
        for value in COLOURS[colour_shape[0]]
    )
    return SceneObject(*colour_shape, cell, x, y, radius, rng.uniform(-0.2, 0.2), shade)  # type: ignore[arg-type]


def make_background(rng: random.Random) -> tuple[tuple[int, int, int], ...]:
    """Draw a muted ground, a little lighter or darker from corner to corner.

    It is lighter than every object. Without that, what tells shapes apart would change its sign
    with the colour, and a small tower would need far longer to learn it.
    """
    light = rng.uniform(190, 243)
    tint = [rng.uniform(-12, 12) for _ in range(3)]
    corners = []
    for _ in range(4):
        shift = rng.uniform(-10, 10)
        red, green, blue = (min(255, max(0, round(light + t + shift))) for t in tint)
        corners.append((red, green, blue))
    return tuple(corners)


def _paint_object(draw: ImageDraw.ImageDraw, scene_object: SceneObject) -> None:
    x, y, radius = (
        scene_object.x * _PAINT_SCALE,
        scene_object.y * _PAINT_SCALE,
        scene_object.radius * _PAINT_SCALE,
    )
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
