"""Pictures told in words: what stands where an image would in text for the language miniature.

Most descriptions are rasters: the picture patch by patch, with all words of a patch at one position
(their embeddings are added). So the language model learns from text that one position can hold
several words, as a visual token must, and `fit` has to teach only which features mean which words.
A patch that shows an object says its colour, its shape, a dot, and the row and the column of the
lattice where the patch is; a patch that shows a letter says the letter instead of the shape.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from vlbench.data.scene_albums import album_heading
from vlbench.data.scene_lattice import LATTICE
from vlbench.data.scene_lattice_text import coordinate_name, coordinates
from vlbench.data.scene_letters import LETTER_GRID
from vlbench.data.scene_painting import LETTERS
from vlbench.data.scene_text import CELL_NAMES, LANGUAGES, object_name
from vlbench.data.scene_world import IMAGE_SIDE, QUARTERS, RenderedScene, SceneObject

# a cell of a raster begins or ends; the next word is written over the last
CELL_SEPARATOR, OVERLAY_SEPARATOR = "\t", "\b"
RASTER_GRIDS = (4, 8)  # cells along a side: the patches at 56 pixels and at 112
DOT_WORD, EMPTY_WORD = " dot", "."
DESCRIPTION_FORMS = {"raster": 7, "bag": 2, "phrases": 1}  # how often each
_COVERED_RADII = 0.7  # a cell shows an object that is at most so many radii away
_DOT_REACH = 4.0  # pixels: a cell shows a dot whose middle is at most so far away


def describe_pictures(
    rng: random.Random, pictures: Sequence[RenderedScene], language: str, grids: Sequence[int]
) -> str:
    """Tell a picture in one of the forms, or an album as rasters after their names.

    The cells along a side of a raster are one of `grids`; letters always have a cell each.
    """
    grid = rng.choice(grids)
    if len(pictures) > 1:
        return describe_in_rasters(pictures, language, grid)
    [scene] = pictures
    if scene.grid == LETTER_GRID:
        return describe_in_rasters(pictures, language, LETTER_GRID)
    form = rng.choices(list(DESCRIPTION_FORMS), list(DESCRIPTION_FORMS.values()))[0]
    if form == "phrases" and scene.grid == QUARTERS:
        return describe_in_phrases(rng, scene) + "\n"
    cells = _told_cells(scene, grid)
    if form == "bag":
        cells = [cell for cell in cells if cell != EMPTY_WORD or rng.random() < 0.3]
        rng.shuffle(cells)
    return _join_cells(cells) + "\n"


def describe_in_rasters(pictures: Sequence[RenderedScene], language: str, grid: int) -> str:
    """Tell a picture as `describe_raster` does, or an album after the pictures' names."""
    rasters = [describe_raster(one, grid) for one in pictures]
    return album_heading(rasters, language) if len(rasters) > 1 else f"{rasters[0]}\n"


def describe_raster(scene: RenderedScene, grid: int) -> str:
    """Tell a picture as `grid` x `grid` cells, words over one another, row by row."""
    return _join_cells(_told_cells(scene, grid))


def describe_line(scene: RenderedScene) -> str:
    """Tell the row of a letter scene where its letters are, as cells of a raster."""
    cells = _told_cells(scene, LETTER_GRID)
    first = scene.objects[0].cell // LETTER_GRID * LETTER_GRID
    return _join_cells(cells[first : first + LETTER_GRID])


def _join_cells(cells: Sequence[str]) -> str:
    return CELL_SEPARATOR + CELL_SEPARATOR.join(cells) + CELL_SEPARATOR


def _told_cells(scene: RenderedScene, grid: int) -> list[str]:
    cells = [EMPTY_WORD] * grid**2
    for thing in scene.objects:
        for cell, away in _covered_cells(thing, scene, grid):
            row, column = divmod(cell, grid)
            words = [f" {thing.colour}", _shape_word(thing)]
            if thing.has_dot and away <= _DOT_REACH:
                words.append(DOT_WORD)
            if scene.grid == LATTICE:
                words += coordinate_name(thing.cell)
            else:
                words += coordinates(column + 0.5, row + 0.5, grid)
            cells[cell] = OVERLAY_SEPARATOR.join(words)
    return cells


def _shape_word(thing: SceneObject) -> str:
    return thing.shape if thing.shape in LETTERS else f" {thing.shape}"


def _covered_cells(thing: SceneObject, scene: RenderedScene, grid: int) -> list[tuple[int, float]]:
    """List the cells that show an object, and how far its middle is from each, in pixels.

    Of the cells whose middle is in its cell of the scene: those that it touches, at least one. A
    raster with as many cells as the scene has shows each in its own.
    """
    pixels = IMAGE_SIDE / grid
    far = []
    for cell in range(grid**2):
        row, column = divmod(cell, grid)
        middle = (column + 0.5) * pixels, (row + 0.5) * pixels
        if (cell if grid == scene.grid else scene.cell_at(*middle)) != thing.cell:
            continue
        across = max(abs((column + 0.5) * pixels - thing.x) - pixels / 2, 0)
        down = max(abs((row + 0.5) * pixels - thing.y) - pixels / 2, 0)
        far.append(((across**2 + down**2) ** 0.5, cell))
    far.sort()
    return [
        (cell, away)
        for rank, (away, cell) in enumerate(far)
        if not rank or away < _COVERED_RADII * thing.radius
    ]


def describe_in_phrases(rng: random.Random, scene: RenderedScene) -> str:
    """Tell a gist scene's objects in ordinary words and random order, some several times.

    So it is with the patches of an image, of which many show the same object.
    """
    language = rng.choice(LANGUAGES)
    parts = []
    for thing in scene.objects:
        where, what = CELL_NAMES[language][thing.cell], object_name(thing, language)
        phrase = f"{what}{where}。" if language == "zh" else f" {what} {where}."
        parts += [phrase] * rng.choice((1, 1, 2))
    rng.shuffle(parts)
    return "".join(parts).strip()
