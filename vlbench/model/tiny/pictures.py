"""What the miniature tower sees while it is pretrained: scenes, near twins of them, close-ups.

Besides the world's own colours there are others that no caption names. Without them a small tower
learns shapes colour by colour, and reads a green star, which it never met, as a green cross. No odd
colour could pass for the one that would make an unseen pair. A close-up shows one quarter of a
scene, as large as it will be when `fit` doubles the image size.
"""

from __future__ import annotations

import colorsys
import math
import random
from dataclasses import dataclass, replace

from PIL import Image

from vlbench.data.scene_text import LANGUAGES, caption, noun
from vlbench.data.scene_world import (
    COLOURS,
    SEEN_PAIRS,
    SHAPES,
    SIDE,
    UNSEEN,
    Scene,
    Thing,
    make_ground,
    make_thing,
    scene,
)

STREAM = "tower"  # of scenes; other parts never meet them
BASES, TWINS = 28, 3  # pictures of a later step, and near twins of each
NAMELESS = ""  # the colour of an odd object
ODD = 0.35  # share of the objects of a whole scene that are odd
_PAIRS = (*SEEN_PAIRS, *((NAMELESS, shape) for shape in SHAPES))
_APART = 40  # RGB distance of odd colours to named ones, at least
_HUES_APART = 75  # degrees between an odd hue and that of the colour that makes an unseen pair
_DARK = 120  # what has no brighter channel could pass for black
_FORBIDDEN = {shape: COLOURS[colour] for colour, shape in UNSEEN.items()}


@dataclass(frozen=True)
class CloseUp:
    """The quarter of a scene where its only object is."""

    scene: Scene

    @property
    def caption(self) -> tuple[str, str]:
        """Give the caption in English and in Chinese; it names no place."""
        thing = self.scene.things[0]
        return f"One object: a {noun(thing, 'en')}.", f"一个物体：{noun(thing, 'zh')}。"

    def open(self) -> Image.Image:
        """Cut the quarter out of the scene, [56, 56] RGB."""
        row, column = divmod(self.scene.things[0].cell, 2)
        half = SIDE // 2
        box = column * half, row * half, (column + 1) * half, (row + 1) * half
        return self.scene.open().crop(box)


def close(step: int, count: int) -> tuple[list[CloseUp], list[str]]:
    """Make close-ups of `count` different objects, odd colours among them."""
    rng = random.Random(f"tower/close/{step}")
    pairs = rng.sample(_PAIRS, count)
    pictures = [CloseUp(arrange(rng, {rng.randrange(4): pair})) for pair in pairs]
    return pictures, [rng.choice(one.caption) for one in pictures]


def single(step: int) -> tuple[list[Scene], list[str]]:
    """Make one picture of every seen pair, and of every shape in an odd colour, in every place."""
    rng = random.Random(f"tower/{step}")
    scenes = [arrange(rng, {cell: pair}) for cell in range(4) for pair in _PAIRS]
    return scenes, [caption(one, rng.choice(LANGUAGES)) for one in scenes]


def whole(step: int, bases: int = BASES) -> tuple[list[Scene], list[str]]:
    """Make whole scenes, no two alike, each with twins that differ from it in one attribute."""
    rng = random.Random(f"tower/{step}")
    scenes: list[Scene] = []
    for number in range(bases):
        base = scene(STREAM, 0, step * bases + number)
        placed = {
            t.cell: (NAMELESS, t.shape) if rng.random() < ODD else t.pair for t in base.things
        }
        scenes += [arrange(rng, placed), *(arrange(rng, twin(rng, placed)) for _ in range(TWINS))]
    different = {tuple((t.cell, t.pair) for t in one.things): one for one in scenes}
    scenes = list(different.values())
    return scenes, [caption(one, rng.choice(LANGUAGES)) for one in scenes]


def arrange(rng: random.Random, placed: dict[int, tuple[str, str]]) -> Scene:
    """Make a scene of the pairs at the given quarters, everything else at random."""
    things = tuple(_thing(rng, placed[cell], cell) for cell in sorted(placed))
    return Scene(STREAM, things, make_ground(rng))


def _thing(rng: random.Random, pair: tuple[str, str], cell: int) -> Thing:
    if pair[0] != NAMELESS:
        return make_thing(rng, pair, cell)
    like = next(seen for seen in SEEN_PAIRS if seen[1] == pair[1])
    thing = make_thing(rng, like, cell)
    return replace(thing, colour=NAMELESS, shade=odd_colour(rng, pair[1]))


def odd_colour(rng: random.Random, shape: str) -> tuple[int, int, int]:
    """Draw a colour without a name, darker than every ground, for an object of this shape."""
    forbidden = _FORBIDDEN[shape]
    while True:
        colour = rng.randrange(20, 236), rng.randrange(20, 236), rng.randrange(20, 236)
        if sum(colour) > 480 or any(math.dist(colour, c) < _APART for c in COLOURS.values()):
            continue
        if max(forbidden) < _DARK:
            if max(colour) >= _DARK:
                return colour
        elif _hues_apart(colour, forbidden) >= _HUES_APART:
            return colour


def _hues_apart(one: tuple[int, int, int], other: tuple[int, int, int]) -> float:
    hues = [360 * colorsys.rgb_to_hsv(*(channel / 255 for channel in c))[0] for c in (one, other)]
    return min(abs(hues[0] - hues[1]), 360 - abs(hues[0] - hues[1]))


def twin(rng: random.Random, placed: dict[int, tuple[str, str]]) -> dict[int, tuple[str, str]]:
    """Change one thing: a colour, a shape, or the places of two objects (or of one)."""
    cell = rng.choice(sorted(placed))
    colour, shape = placed[cell]
    kind = rng.choice(("colour", "shape", "place"))
    if kind == "place":
        other = rng.choice([c for c in range(4) if c != cell])
        swapped = {cell: placed.get(other), other: placed[cell]}
        return {c: p for c, p in (placed | swapped).items() if p is not None}
    if kind == "colour":
        others = [c for c in (*COLOURS, NAMELESS) if c != colour and UNSEEN.get(c) != shape]
        return placed | {cell: (rng.choice(others), shape)}
    shapes = [s for s in SHAPES if s != shape and UNSEEN.get(colour) != s]
    return placed | {cell: (colour, rng.choice(shapes))}
