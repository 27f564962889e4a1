"""Rendered scenes: what a scene holds, and the scenes of the family gist, of one to four objects.

A scene is a pure function of (stream, seed, index): coloured shapes or letters, each somewhere in
its own cell of a grid over the image, on a plain muted background. `scene_lattice` and
`scene_letters` make the scenes of the other families, `scene_painting` paints, and texts are in the
modules named `scene_*_text`. Nothing here imports torch.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlbench.data.picture_labels import LabelledRegion
from vlbench.data.scene_painting import LETTERS, paint_background, paint_dot, paint_shape

if TYPE_CHECKING:
    from PIL import Image

SCENE_VERSION = 3  # of images and texts; raise it when either changes
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
QUARTERS = 2  # cells along a side of a gist scene's grid
# Radii of objects in pixels, by the number of cells along a side: at 4 an object is about as large
# as a patch of 14 pixels, and never touches its neighbours.
_RADII = {2: (16.0, 25.0), 4: (9.0, 12.5)}
CROWD_EXTENT = 68.0  # pixels along a side of a lattice of the family crowd: cells of 17
MAX_LETTERS = 6  # of a scene of letters
EMPTY_CELL = "none"  # the value of a label of a cell without an object, of a letter beyond the last
DOT_LABEL = "cell with a dot"  # the label of a scene of small objects for where its dot is


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape of a scene, or one letter."""

    colour: str  # one of COLOURS; empty where a colour has no name (pretraining alone)
    shape: str  # one of SHAPES, or a letter of `scene_letters`
    cell: int  # its cell of the scene's grid, in raster order: 0 is at the top left
    x: float  # centre, pixels
    y: float
    radius: float  # pixels
    rotation: float  # radians
    painted_colour: tuple[int, int, int]  # the shade of `colour` that is painted
    has_dot: bool = False  # a small dot in its middle

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
    grid: int = QUARTERS  # cells along a side
    corner: tuple[float, float] = (0.0, 0.0)  # x and y where the grid begins, pixels
    extent: float = IMAGE_SIDE  # pixels along a side that the grid covers
    side: int = IMAGE_SIDE  # pixels, width and height

    @property
    def kind(self) -> str:
        """What scenes of the same family are called: by their grid, and how much it covers."""
        return f"{self.grid} x {self.grid} cells on {self.extent:g} pixels"

    @property
    def labels(self) -> dict[str, str]:
        """Its letters, or colour and shape of the object in each cell; EMPTY_CELL without one.

        Of small objects also where the dot is.
        """
        if self._has_letters:
            labels = {letter_label(number): EMPTY_CELL for number in range(MAX_LETTERS)}
            return labels | {letter_label(n): one.shape for n, one in enumerate(self.objects)}
        names = (colour_label, shape_label)
        labels = {name(cell): EMPTY_CELL for cell in range(self.grid**2) for name in names}
        for one in self.objects:
            labels |= {colour_label(one.cell): one.colour, shape_label(one.cell): one.shape}
        if self.grid > QUARTERS:
            dotted = next((str(one.cell) for one in self.objects if one.has_dot), EMPTY_CELL)
            labels[DOT_LABEL] = dotted
        return labels

    @property
    def regions(self) -> list[LabelledRegion]:
        """Its letters or small objects; those of gist, which are large, are no regions."""
        return [] if self.grid == QUARTERS else [*map(self._region, range(len(self.objects)))]

    def _region(self, number: int) -> LabelledRegion:
        one = self.objects[number]
        place = str(one.cell), one.x / self.side, one.y / self.side
        if self._has_letters:
            return LabelledRegion(*place, {"letter": one.shape}, {"letter": letter_label(number)})
        return LabelledRegion(
            *place,
            {"colour": one.colour, "shape": one.shape},
            {"colour": colour_label(one.cell), "shape": shape_label(one.cell)},
            {"colour": "shape", "shape": "colour"} if self.extent == CROWD_EXTENT else {},
            {DOT_LABEL: one.has_dot},
        )

    @property
    def _has_letters(self) -> bool:
        return self.objects[0].shape in LETTERS

    def cell_at(self, x: float, y: float) -> int:
        """Return the cell at a point in pixels; beside the grid, the nearest."""
        row, column = (
            min(max(math.floor((at - begin) * self.grid / self.extent), 0), self.grid - 1)
            for at, begin in ((y, self.corner[1]), (x, self.corner[0]))
        )
        return row * self.grid + column

    def read_size(self, exif: bool) -> tuple[int, int]:
        """Return width and height in pixels."""
        return self.side, self.side

    def open(self) -> Image.Image:
        """Paint the scene, `side` x `side` pixels, RGB."""
        canvas = paint_background(self.corner_colours, self.side)
        for thing in self.objects:
            paint_shape(canvas, thing.shape, thing.x, thing.y, thing.radius, thing.rotation,
                        thing.painted_colour)  # fmt: skip
            if thing.has_dot:
                paint_dot(canvas, thing.x, thing.y, is_dark=thing.colour == "yellow")
        return canvas.finish()


def colour_label(cell: int) -> str:
    """Return the name of the label for the colour in a cell."""
    return f"colour of cell {cell}"


def shape_label(cell: int) -> str:
    """Return the name of the label for the shape in a cell."""
    return f"shape of cell {cell}"


def letter_label(number: int) -> str:
    """Return the name of the label for a letter, counted from 0 at the left."""
    return f"letter {number + 1}"


def make_scene(stream: str, seed: int, index: int, has_unseen_pair: bool = False) -> RenderedScene:
    """Make scene `index` of a stream: one to four objects, each in a quarter of the image.

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


def make_object(
    rng: random.Random, colour_shape: tuple[str, str], cell: int, grid: int = QUARTERS
) -> SceneObject:
    """Draw an object in its cell: a radius of `_RADII`, any position where it fits."""
    side = IMAGE_SIDE / grid
    radius = rng.uniform(*_RADII[grid])
    slack = side / 2 - radius - 0.5
    x = side / 2 + side * (cell % grid) + rng.uniform(-slack, slack)
    y = side / 2 + side * (cell // grid) + rng.uniform(-slack, slack)
    painted_colour = draw_shade(rng, colour_shape[0])
    rotation = rng.uniform(-0.2, 0.2)
    return SceneObject(*colour_shape, cell, x, y, radius, rotation, painted_colour)


def draw_shade(rng: random.Random, colour: str) -> tuple[int, int, int]:
    """Draw a shade of a named colour, RGB."""
    brightness = rng.uniform(0.86, 1.1)
    red, green, blue = (
        min(255, max(0, round(value * brightness + rng.uniform(-8, 8))))
        for value in COLOURS[colour]
    )
    return red, green, blue


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
