"""What the answer to a question about rendered scenes rests on, in labels of the scenes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vlbench.data.picture_labels import Evidence
from vlbench.data.scene_families import list_picture_questions
from vlbench.data.scene_text import CHINESE_WORDS, TOTAL_QUESTIONS, SceneQuestion
from vlbench.data.scene_world import (
    COLOURS,
    DOT_LABEL,
    EMPTY_CELL,
    QUARTERS,
    SHAPES,
    RenderedScene,
    SceneObject,
    colour_label,
    letter_label,
    shape_label,
)

_ANY_VALUE = {colour_label: frozenset(COLOURS), shape_label: frozenset(SHAPES)}


def question_evidence(
    pictures: Sequence[RenderedScene], question_type: str, language: str, text: str
) -> tuple[Evidence, ...]:
    """Return what must be read of its pictures to answer a question, () for another text.

    Of the objects that the question is about, these are the attributes that it names and those
    that its answer names, each in the cell where the object is: an object that is read elsewhere
    does not count. In a crowd it is what the answer names alone. A question for a number rests on
    every quarter: does an object there count? One for a word rests on each of its letters, one for
    what has the dot on where the dot is.
    """
    for question in list_picture_questions(pictures, language):
        if (question.type, question.text) == (question_type, text):
            scene = pictures[question.picture]
            found = _scene_evidence(scene, question)
            return tuple(one._replace(picture=question.picture) for one in found)
    return ()


def _scene_evidence(scene: RenderedScene, question: SceneQuestion) -> Iterator[Evidence]:
    if question.type == "count":
        yield from _counted_evidence(scene, question)
    elif question.type == "glyphs":
        for number, one in enumerate(scene.objects):
            yield Evidence(letter_label(number), frozenset({one.shape}))
    else:
        yield from _object_evidence(scene, question)


def _object_evidence(scene: RenderedScene, question: SceneQuestion) -> Iterator[Evidence]:
    # an object of a crowd is found by what the question names, wherever it is
    told = f"{'' if question.type == 'crowd' else question.text} {question.answer}".lower()
    for one in scene.objects:
        if one.colour_shape not in question.relevant_pairs:
            continue
        if question.relevant_cells and one.cell not in question.relevant_cells:
            continue
        if question.type == "fine":
            yield Evidence(DOT_LABEL, frozenset({str(one.cell)}))
        if _names(told, one.colour, question.language):
            yield Evidence(colour_label(one.cell), frozenset({one.colour}))
        if _names(told, one.shape, question.language):
            yield Evidence(shape_label(one.cell), frozenset({one.shape}))


def _counted_evidence(scene: RenderedScene, question: SceneQuestion) -> Iterator[Evidence]:
    """Yield one for each quarter: values that are counted, where its object is, else the others."""
    colour, shape = question.relevant_pairs[0]
    label, counted = shape_label, frozenset({shape})
    if question.text == TOTAL_QUESTIONS[question.language]:
        counted = _ANY_VALUE[label]
    elif _names(question.text, colour, question.language):
        label, counted = colour_label, frozenset({colour})
    others = _ANY_VALUE[label] - counted | {EMPTY_CELL}
    by_cell = {one.cell: one for one in scene.objects}
    for cell in range(QUARTERS**2):
        value = _value_of(by_cell.get(cell), label is colour_label)
        yield Evidence(label(cell), counted if value in counted else others)


def _value_of(scene_object: SceneObject | None, is_colour: bool) -> str:
    if scene_object is None:
        return EMPTY_CELL
    return scene_object.colour if is_colour else scene_object.shape


def _names(text: str, word: str, language: str) -> bool:
    return (CHINESE_WORDS[word] if language == "zh" else word) in text
