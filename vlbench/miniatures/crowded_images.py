"""Scenes of small objects, dots and letters for the dense supervision of the miniature CLIP.

They hold what the families crowd, place, fine and glyphs hold, but more of it: the cost of a step
is that of its images, and what is learned from it that of their objects. Odd colours are here too,
for the reason that `training_images` gives. No unseen pair occurs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from vlbench.data.scene_lattice import LATTICE, shrink_anywhere
from vlbench.data.scene_letters import LETTER_GRID
from vlbench.data.scene_painting import LETTERS
from vlbench.data.scene_world import (
    COLOURS,
    IMAGE_SIDE,
    SEEN_PAIRS,
    RenderedScene,
    SceneObject,
    draw_shade,
    make_background,
)
from vlbench.miniatures.training_images import (
    IMAGE_SCENE_STREAM,
    NAMELESS_COLOUR,
    ODD_COLOUR_SHARE,
    arrange_scene,
)

_DOTTED_SCENES, _DOTTED_OBJECTS = 0.6, 0.4  # share of the scenes, and of the objects in these
_HALF_HEIGHTS, _MAX_SHIFT = (5.2, 7.0), 2.0  # of letters, pixels: a little more than is asked


def crowded_scenes(
    step: int, count: int, extents: Sequence[float] = (IMAGE_SIDE,)
) -> list[RenderedScene]:
    """Make lattices of small objects, of which some have dots.

    They fill the image or, as in the exam, are of one of these extents (pixels) and anywhere.
    """
    rng = random.Random(f"tower/crowd/{step}")
    scenes = [_crowded_scene(rng) for _ in range(count)]
    if extents == (IMAGE_SIDE,):
        return scenes
    sides = [extents[number % len(extents)] for number in range(count)]
    return [shrink_anywhere(rng, one, side) for one, side in zip(scenes, sides, strict=True)]


def letter_scenes(step: int, count: int) -> list[RenderedScene]:
    """Make scenes of letters of all colours, anywhere."""
    rng = random.Random(f"tower/letters/{step}")
    return [_letter_scene(rng) for _ in range(count)]


def _crowded_scene(rng: random.Random) -> RenderedScene:
    placed = {}
    for cell in rng.sample(range(LATTICE**2), rng.randint(LATTICE, LATTICE**2)):
        colour, shape = rng.choice(SEEN_PAIRS)
        placed[cell] = (NAMELESS_COLOUR if rng.random() < ODD_COLOUR_SHARE else colour, shape)
    scene = arrange_scene(rng, placed, LATTICE)
    share = _DOTTED_OBJECTS if rng.random() < _DOTTED_SCENES else 0.0
    return replace(
        scene, objects=tuple(replace(t, has_dot=rng.random() < share) for t in scene.objects)
    )


def _letter_scene(rng: random.Random) -> RenderedScene:
    count = rng.randint(LETTER_GRID, LETTER_GRID**2 // 2)
    cells = sorted(rng.sample(range(LETTER_GRID**2), count))
    letters = tuple(_place_letter(rng, cell) for cell in cells)
    return RenderedScene(IMAGE_SCENE_STREAM, letters, make_background(rng), LETTER_GRID)


def _place_letter(rng: random.Random, cell: int) -> SceneObject:
    side = IMAGE_SIDE / LETTER_GRID
    row, column = divmod(cell, LETTER_GRID)
    x = (column + 0.5) * side + rng.uniform(-_MAX_SHIFT, _MAX_SHIFT)
    y = (row + 0.5) * side + rng.uniform(-_MAX_SHIFT, _MAX_SHIFT)
    colour, half_height = rng.choice(tuple(COLOURS)), rng.uniform(*_HALF_HEIGHTS)
    rotation, shade = rng.uniform(-0.12, 0.12), draw_shade(rng, colour)
    return SceneObject(colour, rng.choice(LETTERS), cell, x, y, half_height, rotation, shade)
