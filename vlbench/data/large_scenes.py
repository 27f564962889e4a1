"""Large scenes: pictures of more pixels than the encoder's square, with small letters or shapes.

A picture of 224 pixels that is resized to a square of 112 shows everything at half its size; tiles
show it as it is. Letters of up to 14 pixels have a cell of 14 pixels each, whatever their height,
so that a higher letter differs in nothing else; those of 20 and more, which the square shows well,
have one of 28. Words, questions and answers are those of the other scenes, which the language
miniature has read.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from vlbench.data.scene_letters import (
    MIN_LETTERS,
    letter_caption,
    list_letter_questions,
)
from vlbench.data.scene_painting import LETTERS
from vlbench.data.scene_text import SceneQuestion, list_attribute_questions, scene_caption
from vlbench.data.scene_world import (
    COLOURS,
    MAX_LETTERS,
    QUARTERS,
    SEEN_PAIRS,
    RenderedScene,
    SceneObject,
    draw_shade,
    make_background,
)

LARGE_SIDE = 224  # pixels, width and height: 2 x 2 squares of 112
LARGE_FAMILIES = ("letters", "shapes")
HEIGHT_BANDS = ((6, 8), (8, 10), (10, 12), (12, 14), (20, 28))  # of letters and shapes, pixels
LETTER_CELL = 14  # pixels along a side; higher letters have as many as they need
_JITTER = 1.0  # pixels
_MIN_SHAPES, _MAX_SHAPES = 2, 4
_THIN_COLOURS = tuple(colour for colour in COLOURS if colour != "yellow")  # thin yellow is unseen


def make_large_scene(
    family: str, stream: str, seed: int, index: int, side: int = LARGE_SIDE
) -> RenderedScene:
    """Make large scene `index` of a stream; heights are those of all bands in turns.

    All letters or shapes of a scene are of one band. `side` is in pixels.
    """
    rng = random.Random(f"large/{family}/{side}/{stream}/{seed}/{index}")
    heights = HEIGHT_BANDS[index % len(HEIGHT_BANDS)]
    name = f"scene-large-{family}-{side}-{stream}-{seed}-{index}"
    if family == "shapes":
        objects, background = _make_shapes(rng, heights, side), make_background(rng)
        return RenderedScene(name, objects, background, extent=side, side=side)
    cell = LETTER_CELL * -(-heights[1] // LETTER_CELL)
    objects, background = _make_letters(rng, heights, side // cell, cell), make_background(rng)
    return RenderedScene(
        name, objects, background, side // cell, extent=side // cell * cell, side=side
    )


def _make_letters(
    rng: random.Random, heights: tuple[int, int], grid: int, cell: int
) -> tuple[SceneObject, ...]:
    """Draw a line of different letters of one colour, anywhere; a cell has `cell` pixels."""
    most = min(MAX_LETTERS, grid)
    letters = rng.sample(LETTERS, rng.randint(MIN_LETTERS, most))
    row, first = rng.randrange(grid), rng.randrange(grid - len(letters) + 1)
    colour, y = rng.choice(_THIN_COLOURS), (row + 0.5) * cell + rng.uniform(-1, 1) * _JITTER
    shade = draw_shade(rng, colour)
    return tuple(
        SceneObject(
            colour,
            letter,
            row * grid + column,
            (column + 0.5) * cell + rng.uniform(-1, 1) * _JITTER,
            y,
            rng.uniform(*heights) / 2,
            rng.uniform(-0.1, 0.1),
            shade,
        )
        for column, letter in enumerate(letters, first)
    )


def _make_shapes(
    rng: random.Random, heights: tuple[int, int], side: int
) -> tuple[SceneObject, ...]:
    """Draw objects of different colours and shapes, each somewhere in a quarter of the picture."""
    cells = sorted(rng.sample(range(QUARTERS**2), rng.randint(_MIN_SHAPES, _MAX_SHAPES)))
    pairs: list[tuple[str, str]] = []
    while len(pairs) < len(cells):
        colour, shape = rng.choice(SEEN_PAIRS)
        if all(colour != c and shape != s for c, s in pairs):
            pairs.append((colour, shape))
    quarter, objects = side / QUARTERS, []
    for cell, (colour, shape) in zip(cells, pairs, strict=True):
        radius = rng.uniform(*heights) / 2
        row, column = divmod(cell, QUARTERS)
        x, y = (
            quarter * at + rng.uniform(radius + 1, quarter - radius - 1) for at in (column, row)
        )
        rotation, shade = rng.uniform(-0.2, 0.2), draw_shade(rng, colour)
        objects.append(SceneObject(colour, shape, cell, x, y, radius, rotation, shade))
    return tuple(objects)


def large_caption(scene: RenderedScene, language: str) -> str:
    """Return one sentence: the letters that are written, or every shape with its place."""
    return (letter_caption if _has_letters(scene) else scene_caption)(scene, language)


def list_large_questions(scene: RenderedScene, language: str) -> list[SceneQuestion]:
    """List all questions: what is written, or colour and shape of each object.

    Their type is that of `question_type`.
    """
    if _has_letters(scene):
        asked: Sequence[SceneQuestion] = list_letter_questions(scene, language)
    else:
        asked = list_attribute_questions(scene.objects, language)
    return [
        SceneQuestion(question_type(scene), language, q.text, q.answer, q.relevant_pairs)
        for q in asked
    ]


def question_type(scene: RenderedScene) -> str:
    """Return family and band of heights of a scene: "letters 6-8 px"."""
    height = 2 * scene.objects[0].radius
    low, high = next(band for band in HEIGHT_BANDS if height <= band[1])
    return f"{LARGE_FAMILIES[not _has_letters(scene)]} {low}-{high} px"


def _has_letters(scene: RenderedScene) -> bool:
    return scene.objects[0].shape in LETTERS
