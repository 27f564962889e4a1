"""Scenes of the family glyphs: a line of two to six letters of 10 to 14 pixels, and their texts."""

from __future__ import annotations

import random

from vlbench.data.scene_painting import LETTERS
from vlbench.data.scene_text import SceneQuestion
from vlbench.data.scene_world import (
    IMAGE_SIDE,
    MAX_LETTERS,
    RenderedScene,
    SceneObject,
    draw_shade,
    make_background,
)

LETTER_GRID = 8  # cells along a side: a letter has a cell of 14 pixels
MIN_LETTERS = 2
_HALF_HEIGHTS = (5.5, 6.8)  # pixels
_COLOURS = ("red", "green", "blue", "purple", "black")  # thin yellow strokes can hardly be seen
LETTER_QUESTIONS = {"en": "Which letters are written here?", "zh": "图中写着哪些字母？"}


def make_letter_scene(stream: str, seed: int, index: int) -> RenderedScene:
    """Make letter scene `index` of a stream: different letters of one colour, side by side."""
    rng = random.Random(f"letters/{stream}/{seed}/{index}")
    letters = rng.sample(LETTERS, rng.randint(MIN_LETTERS, MAX_LETTERS))
    row, first = rng.randrange(LETTER_GRID), rng.randrange(LETTER_GRID - len(letters) + 1)
    colour = rng.choice(_COLOURS)
    shade, side = draw_shade(rng, colour), IMAGE_SIDE / LETTER_GRID
    shift, objects = rng.uniform(-1, 1), []
    for number, letter in enumerate(letters):
        column, half_height = first + number, rng.uniform(*_HALF_HEIGHTS)
        x, y = (column + 0.5) * side + rng.uniform(-1, 1), (row + 0.5) * side + shift
        cell, rotation = row * LETTER_GRID + column, rng.uniform(-0.1, 0.1)
        objects.append(SceneObject(colour, letter, cell, x, y, half_height, rotation, shade))
    name = f"scene-letters-{stream}-{seed}-{index}"
    return RenderedScene(name, tuple(objects), make_background(rng), LETTER_GRID)


def written_word(scene: RenderedScene) -> str:
    """Return the letters of a scene from left to right."""
    return "".join(thing.shape for thing in scene.objects)


def letter_caption(scene: RenderedScene, language: str) -> str:
    """Return one sentence: the letters that are written."""
    word = written_word(scene)
    return f'图中写着"{word}"。' if language == "zh" else f'It reads "{word}".'


def list_letter_questions(scene: RenderedScene, language: str) -> list[SceneQuestion]:
    """List the one question about a letter scene: what is written."""
    answer = f'"{written_word(scene)}"' + ("。" if language == "zh" else ".")
    return [SceneQuestion("glyphs", language, LETTER_QUESTIONS[language], answer, ())]
