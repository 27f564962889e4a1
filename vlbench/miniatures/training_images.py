"""Images for pretraining the miniature CLIP: scenes, near duplicates (twins), and close-ups.

Besides the named colours of the rendered scenes there are odd colours that no caption names.
Without them a small encoder learns shapes colour by colour and takes a green star, an unseen pair,
for a green cross. No odd colour is close to one that would make an unseen pair. A close-up is one
quarter of a scene at the resolution that `fit` uses after it doubles the image size.
"""

from __future__ import annotations

import colorsys
import math
import random
from dataclasses import dataclass, replace

from PIL import Image

from vlbench.data.scene_text import LANGUAGES, object_name, scene_caption
from vlbench.data.scene_world import (
    COLOURS,
    IMAGE_SIDE,
    QUARTERS,
    SEEN_PAIRS,
    SHAPES,
    UNSEEN_PAIRS,
    RenderedScene,
    SceneObject,
    make_background,
    make_object,
    make_scene,
)

IMAGE_SCENE_STREAM = "tower"  # a stream of its own: part of the seed, as "tower" below
BASE_SCENES, TWINS_PER_SCENE = 28, 3  # scenes of a later step, and twins of each
NAMELESS_COLOUR = ""  # the name of an odd colour
ODD_COLOUR_SHARE = 0.35  # share of the objects of a whole scene that are odd
_COLOUR_SHAPE_PAIRS = (*SEEN_PAIRS, *((NAMELESS_COLOUR, shape) for shape in SHAPES))
_MIN_COLOUR_DISTANCE = 40  # RGB distance of odd colours to named ones, at least
# degrees between an odd hue and that of the colour that makes an unseen pair
_MIN_HUE_DISTANCE = 75
_DARK_CHANNEL_LIMIT = 120  # what has no brighter channel could pass for black
_UNSEEN_PAIR_COLOURS = {shape: COLOURS[colour] for colour, shape in UNSEEN_PAIRS.items()}


@dataclass(frozen=True)
class CloseUpImage:
    """The quarter of a scene where its only object is."""

    scene: RenderedScene

    @property
    def captions(self) -> tuple[str, str]:
        """Give the caption in English and in Chinese; it names no place."""
        thing = self.scene.objects[0]
        return (
            f"One object: a {object_name(thing, 'en')}.",
            f"一个物体：{object_name(thing, 'zh')}。",
        )

    def open(self) -> Image.Image:
        """Cut the quarter out of the scene, [56, 56] RGB."""
        row, column = divmod(self.scene.objects[0].cell, 2)
        half = IMAGE_SIDE // 2
        box = column * half, row * half, (column + 1) * half, (row + 1) * half
        return self.scene.open().crop(box)


def make_close_ups(step: int, count: int) -> tuple[list[CloseUpImage], list[str]]:
    """Make close-ups of `count` different objects, odd colours among them."""
    rng = random.Random(f"tower/close/{step}")
    pairs = rng.sample(_COLOUR_SHAPE_PAIRS, count)
    images = [CloseUpImage(arrange_scene(rng, {rng.randrange(4): pair})) for pair in pairs]
    return images, [rng.choice(one.captions) for one in images]


def single_object_scenes(step: int) -> tuple[list[RenderedScene], list[str]]:
    """Make one image of every seen pair, and of every shape in an odd colour, in every place."""
    rng = random.Random(f"tower/{step}")
    scenes = [arrange_scene(rng, {cell: pair}) for cell in range(4) for pair in _COLOUR_SHAPE_PAIRS]
    return scenes, [scene_caption(one, rng.choice(LANGUAGES)) for one in scenes]


def whole_scenes(
    step: int, base_scenes: int = BASE_SCENES
) -> tuple[list[RenderedScene], list[str]]:
    """Make whole scenes, no two alike, each with twins that differ from it in one attribute."""
    rng = random.Random(f"tower/{step}")
    scenes: list[RenderedScene] = []
    for number in range(base_scenes):
        base = make_scene(IMAGE_SCENE_STREAM, 0, step * base_scenes + number)
        placed = {
            t.cell: (NAMELESS_COLOUR, t.shape)
            if rng.random() < ODD_COLOUR_SHARE
            else t.colour_shape
            for t in base.objects
        }
        scenes += [
            arrange_scene(rng, placed),
            *(arrange_scene(rng, make_twin(rng, placed)) for _ in range(TWINS_PER_SCENE)),
        ]
    different = {tuple((t.cell, t.colour_shape) for t in one.objects): one for one in scenes}
    scenes = list(different.values())
    return scenes, [scene_caption(one, rng.choice(LANGUAGES)) for one in scenes]


def arrange_scene(
    rng: random.Random, pairs_by_cell: dict[int, tuple[str, str]], grid: int = QUARTERS
) -> RenderedScene:
    """Make a scene of the pairs at the given cells, everything else at random."""
    things = tuple(
        _place_object(rng, pairs_by_cell[cell], cell, grid) for cell in sorted(pairs_by_cell)
    )
    return RenderedScene(IMAGE_SCENE_STREAM, things, make_background(rng), grid)


def _place_object(rng: random.Random, pair: tuple[str, str], cell: int, grid: int) -> SceneObject:
    if pair[0] != NAMELESS_COLOUR:
        return make_object(rng, pair, cell, grid)
    like = next(seen for seen in SEEN_PAIRS if seen[1] == pair[1])
    thing = make_object(rng, like, cell, grid)
    return replace(thing, colour=NAMELESS_COLOUR, painted_colour=draw_odd_colour(rng, pair[1]))


def draw_odd_colour(rng: random.Random, shape: str) -> tuple[int, int, int]:
    """Draw a colour without a name, darker than every ground, for an object of this shape."""
    forbidden = _UNSEEN_PAIR_COLOURS[shape]
    while True:
        colour = rng.randrange(20, 236), rng.randrange(20, 236), rng.randrange(20, 236)
        if sum(colour) > 480 or any(
            math.dist(colour, c) < _MIN_COLOUR_DISTANCE for c in COLOURS.values()
        ):
            continue
        if max(forbidden) < _DARK_CHANNEL_LIMIT:
            if max(colour) >= _DARK_CHANNEL_LIMIT:
                return colour
        elif _hue_distance(colour, forbidden) >= _MIN_HUE_DISTANCE:
            return colour


def _hue_distance(first_colour: tuple[int, int, int], second_colour: tuple[int, int, int]) -> float:
    hues = [
        360 * colorsys.rgb_to_hsv(*(channel / 255 for channel in c))[0]
        for c in (first_colour, second_colour)
    ]
    return min(abs(hues[0] - hues[1]), 360 - abs(hues[0] - hues[1]))


def make_twin(
    rng: random.Random, pairs_by_cell: dict[int, tuple[str, str]]
) -> dict[int, tuple[str, str]]:
    """Change one thing: a colour, a shape, or the places of two objects (or of one)."""
    cell = rng.choice(sorted(pairs_by_cell))
    colour, shape = pairs_by_cell[cell]
    kind = rng.choice(("colour", "shape", "place"))
    if kind == "place":
        other = rng.choice([c for c in range(4) if c != cell])
        swapped = {cell: pairs_by_cell.get(other), other: pairs_by_cell[cell]}
        return {c: p for c, p in (pairs_by_cell | swapped).items() if p is not None}
    if kind == "colour":
        others = [
            c for c in (*COLOURS, NAMELESS_COLOUR) if c != colour and UNSEEN_PAIRS.get(c) != shape
        ]
        return pairs_by_cell | {cell: (rng.choice(others), shape)}
    shapes = [s for s in SHAPES if s != shape and UNSEEN_PAIRS.get(colour) != s]
    return pairs_by_cell | {cell: (colour, rng.choice(shapes))}
