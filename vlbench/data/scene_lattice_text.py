"""The texts of crowded scenes: captions by coordinates, and questions of crowd, place and fine."""

from __future__ import annotations

from collections import Counter

from vlbench.data.scene_lattice import LATTICE
from vlbench.data.scene_text import SceneQuestion, list_attribute_questions, object_name
from vlbench.data.scene_world import CROWD_EXTENT, RenderedScene, SceneObject

ROW_NAMES, COLUMN_NAMES = "1234", "abcd"  # of the lattice, from the top and from the left
DOT_QUESTIONS = {"en": "Which object has a dot?", "zh": "哪个物体上有圆点？"}
# side: name in English, name in Chinese, rows down, columns right
_SIDES = (
    ("to the left of", "左边", 0, -1),
    ("to the right of", "右边", 0, 1),
    ("above", "上边", -1, 0),
    ("below", "下边", 1, 0),
)


def coordinates(x: float, y: float, image_side: float) -> tuple[str, str]:
    """Return the names of the row and the column of a point in a square image."""
    row, column = (min(int(v * LATTICE / image_side), LATTICE - 1) for v in (y, x))
    return ROW_NAMES[row], COLUMN_NAMES[column]


def coordinate_name(cell: int) -> str:
    """Return the row and the column of a cell of the lattice: "3d"."""
    row, column = divmod(cell, LATTICE)
    return ROW_NAMES[row] + COLUMN_NAMES[column]


def lattice_caption(scene: RenderedScene, language: str) -> str:
    """Return one sentence: every object in raster order, after its row and column: "1a red star".

    The object with a dot is named at the end.
    """
    told = [f"{coordinate_name(t.cell)}{_named(t, language)}" for t in scene.objects]
    told += [
        f"圆点{coordinate_name(t.cell)}" if language == "zh" else f"dot {coordinate_name(t.cell)}"
        for t in scene.objects
        if t.has_dot
    ]
    return f"{'，'.join(told)}。" if language == "zh" else f"{', '.join(told)}."


def list_lattice_questions(scene: RenderedScene, language: str) -> list[SceneQuestion]:
    """List all questions about a scene: crowd if it is dense, else place, and fine with a dot."""
    if scene.extent == CROWD_EXTENT:
        return list_crowd_questions(scene, language)
    return [*list_place_questions(scene, language), *list_fine_questions(scene, language)]


def list_crowd_questions(scene: RenderedScene, language: str) -> list[SceneQuestion]:
    """Ask for the colour of a shape that occurs once, and for the shape of such a colour."""
    return [
        SceneQuestion("crowd", language, q.text, q.answer, q.relevant_pairs)
        for q in list_attribute_questions(scene.objects, language)
    ]


def list_place_questions(scene: RenderedScene, language: str) -> list[SceneQuestion]:
    """Ask what is next to an object, on any side, whose colour and shape occur together once.

    The answer gives the neighbour's row and column and its name, as captions do: "3d blue heart".
    """
    counts = Counter(t.colour_shape for t in scene.objects)
    asked = []
    for thing in scene.objects:
        if counts[thing.colour_shape] > 1:
            continue
        name = object_name(thing, language)
        for side, beside in list_neighbours(scene, thing, language):
            told = f"{coordinate_name(beside.cell)}{_named(beside, language)}"
            if language == "zh":
                text, answer = f"{name}的{side}是什么？", f"{told}。"
            else:
                text, answer = f"What is {side} the {name}?", f"{told}."
            pairs = (thing.colour_shape, beside.colour_shape)
            cells = (thing.cell, beside.cell)
            asked.append(SceneQuestion("place", language, text, answer, pairs, cells))
    return asked


def list_neighbours(
    scene: RenderedScene, thing: SceneObject, language: str
) -> list[tuple[str, SceneObject]]:
    """List the objects next to one, each after the name of its side: "to the left of"."""
    by_cell = {t.cell: t for t in scene.objects}
    row, column = divmod(thing.cell, LATTICE)
    return [
        (side_zh if language == "zh" else side_en, by_cell[cell])
        for side_en, side_zh, down, right in _SIDES
        if 0 <= column + right < LATTICE
        and (cell := (row + down) * LATTICE + column + right) in by_cell
    ]


def list_fine_questions(scene: RenderedScene, language: str) -> list[SceneQuestion]:
    """Ask which object has the dot, if there is one."""
    return [
        SceneQuestion(
            "fine",
            language,
            DOT_QUESTIONS[language],
            f"{object_name(t, 'zh')}。" if language == "zh" else f"The {object_name(t, 'en')}.",
            (t.colour_shape,),
            (t.cell,),
        )
        for t in scene.objects
        if t.has_dot
    ]


def _named(thing: SceneObject, language: str) -> str:
    name = object_name(thing, language)
    return name if language == "zh" else f" {name}"
