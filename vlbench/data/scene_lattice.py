"""Scenes of the families crowd, place and fine: 6 to 16 objects on a lattice of 4 x 4 cells.

Those of crowd are denser: a square of 28 pixels, which a connector may make one token of, holds
three objects of such a scene on the average, and one and a half of the others.

Most colours and shapes occur several times; one or two of each occur exactly once, so that "the
star" and "the red object" name something. In a scene with a dot, one object has it.
"""

from __future__ import annotations

import random
from dataclasses import replace

from vlbench.data.scene_world import (
    COLOURS,
    IMAGE_SIDE,
    SHAPES,
    UNSEEN_PAIRS,
    RenderedScene,
    make_background,
    make_object,
)

LATTICE = 4  # cells along a side
# The lattice is somewhere in the image: objects lie across the borders of patches of 14 pixels, and
# of any blocks of patches that a connector may join. Rows and columns can be told from pixels
# nevertheless: wherever it is, no row covers the middle of another.
EXTENT = 96.0  # pixels along a side of the lattice, cells of 24
MIN_OBJECTS, MAX_OBJECTS = 6, LATTICE**2


def make_lattice_scene(
    stream: str, seed: int, index: int, has_dot: bool = False, extent: float = EXTENT
) -> RenderedScene:
    """Make scene `index` of a stream, without unseen pairs; `extent` in pixels."""
    rng = random.Random(f"lattice/{stream}/{seed}/{index}")
    count = rng.randint(MIN_OBJECTS, MAX_OBJECTS)
    pairs = _draw_crowd(rng, count)
    cells = sorted(rng.sample(range(LATTICE**2), count))
    marked = rng.randrange(count)  # drawn in any case: with a dot or without, the rest is the same
    objects = tuple(
        replace(make_object(rng, pair, cell, LATTICE), has_dot=has_dot and number == marked)
        for number, (pair, cell) in enumerate(zip(pairs, cells, strict=True))
    )
    name = f"scene-lattice-{stream}-{seed}-{index}"
    return shrink_anywhere(rng, RenderedScene(name, objects, make_background(rng), LATTICE), extent)


def shrink_anywhere(
    rng: random.Random, scene: RenderedScene, extent: float = EXTENT
) -> RenderedScene:
    """Return a lattice that fills the image at `extent` pixels a side, a third of a cell around."""
    middle, shift = (IMAGE_SIDE - extent) / 2, extent / LATTICE / 3
    left, top = (rng.uniform(middle - shift, middle + shift) for _ in range(2))
    scale = extent / IMAGE_SIDE
    objects = tuple(
        replace(t, x=left + t.x * scale, y=top + t.y * scale, radius=t.radius * scale)
        for t in scene.objects
    )
    return replace(scene, objects=objects, corner=(left, top), extent=extent)


def _draw_crowd(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Draw (colour, shape) pairs of which one or two shapes and colours occur exactly once."""
    colours, shapes = rng.sample(tuple(COLOURS), len(COLOURS)), rng.sample(SHAPES, len(SHAPES))
    single_shapes, single_colours = rng.randint(1, 2), rng.randint(1, 2)
    common = [
        (colour, shape)
        for colour in colours[single_colours:]
        for shape in shapes[single_shapes:]
        if UNSEEN_PAIRS[colour] != shape
    ]
    pairs = [
        (rng.choice([c for c in colours[single_colours:] if UNSEEN_PAIRS[c] != shape]), shape)
        for shape in shapes[:single_shapes]
    ]
    pairs += [
        (colour, rng.choice([s for s in shapes[single_shapes:] if UNSEEN_PAIRS[colour] != s]))
        for colour in colours[:single_colours]
    ]
    pairs += rng.choices(common, k=count - len(pairs))
    rng.shuffle(pairs)
    return pairs
