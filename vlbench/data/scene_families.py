"""The six families of questions about rendered pictures, and what a picture is asked.

| family | pictures | question |
|---|---|---|
| gist | one, with 1 to 4 large objects | colour, shape, count, position, relation |
| crowd | one, with 6 to 16 small objects | the colour of the star, the shape of what is red |
| place | one, with 6 to 16 objects | what is right of the red star, with its row and column |
| fine | the same as place, one object has a dot | which object |
| glyphs | one, with 2 to 6 letters | which letters |
| many | 2 to 4 of gist | colour, shape, position in one of them |
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from vlbench.data.scene_albums import list_album_questions, make_album
from vlbench.data.scene_lattice import LATTICE, make_lattice_scene
from vlbench.data.scene_lattice_text import lattice_caption, list_lattice_questions
from vlbench.data.scene_letters import (
    LETTER_GRID,
    letter_caption,
    list_letter_questions,
    make_letter_scene,
)
from vlbench.data.scene_text import QUESTION_TYPES, SceneQuestion, list_questions, scene_caption
from vlbench.data.scene_world import CROWD_EXTENT, RenderedScene, make_scene

FAMILIES = ("gist", "crowd", "place", "glyphs", "fine", "many")
LATTICE_FAMILIES = ("place", "fine")  # asked about the same pictures
DOT_SHARE = 0.5  # share of the training pictures of place in which an object has a dot
# Training pictures by what is asked; "place" stands for fine as well.
FAMILY_WEIGHTS = {"gist": 44, "crowd": 10, "place": 22, "glyphs": 15, "many": 9}
CAPTION_WEIGHTS = {"gist": 26, "crowd": 16, "place": 34, "glyphs": 24}  # the same, of captions


def family_of(question_type: str) -> str:
    """Return the family of a type of question: its own name, or gist."""
    return "gist" if question_type in QUESTION_TYPES else question_type


def draw_family(rng: random.Random, weights: dict[str, int]) -> str:
    """Draw a family with these weights."""
    return rng.choices(list(weights), list(weights.values()))[0]


def make_pictures(
    family: str, stream: str, seed: int, index: int, has_dot: bool = False
) -> tuple[RenderedScene, ...]:
    """Make the pictures of sample `index`; `has_dot` is for families of the lattice."""
    if family == "crowd":
        return (make_lattice_scene(stream, seed, index, extent=CROWD_EXTENT),)
    if family in LATTICE_FAMILIES:
        return (make_lattice_scene(stream, seed, index, has_dot),)
    if family == "glyphs":
        return (make_letter_scene(stream, seed, index),)
    if family == "many":
        return make_album(stream, seed, index)
    return (make_scene(stream, seed, index),)


def list_picture_questions(pictures: Sequence[RenderedScene], language: str) -> list[SceneQuestion]:
    """List all questions of all families about one picture, or about an album."""
    if len(pictures) > 1:
        return list_album_questions(pictures, language)
    [scene] = pictures
    if scene.grid == LATTICE:
        return list_lattice_questions(scene, language)
    if scene.grid == LETTER_GRID:
        return list_letter_questions(scene, language)
    return list_questions(scene, language)


def picture_caption(scene: RenderedScene, language: str) -> str:
    """Return one sentence about a picture of any family."""
    if scene.grid == LATTICE:
        return lattice_caption(scene, language)
    if scene.grid == LETTER_GRID:
        return letter_caption(scene, language)
    return scene_caption(scene, language)
