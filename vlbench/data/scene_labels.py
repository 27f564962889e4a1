"""Exact labels of rendered scenes, and what the answer to a question about one rests on."""

from __future__ import annotations

from collections.abc import Iterator

from vlbench.data.picture_labels import Evidence
from vlbench.data.scene_text import CHINESE_WORDS, TOTAL_QUESTIONS, SceneQuestion, list_questions
from vlbench.data.scene_world import (
    CELL_COUNT,
    COLOURS,
    EMPTY_CELL,
    SHAPES,
    RenderedScene,
    SceneObject,
    colour_label,
    shape_label,
)

_ANY_VALUE = {colour_label: frozenset(COLOURS), shape_label: frozenset(SHAPES)}


def question_evidence(
    scene: RenderedScene, question_type: str, language: str, text: str
) -> tuple[Evidence, ...]:
    """Return what must be read of a scene to answer one of `list_questions`, () for another text.

    Of the objects that the question is about, these are the attributes that it names and the one
    that it asks for, each in the quarter where the object is: an object that is read elsewhere does
    not count. A question for a number rests on every quarter: does an object there count?
    """
    for question in list_questions(scene, language):
        if (question.type, question.text) == (question_type, text):
            if question_type == "count":
                return tuple(_counted_evidence(scene, question))
            return tuple(_object_evidence(scene, question))
    return ()


def _object_evidence(scene: RenderedScene, question: SceneQuestion) -> Iterator[Evidence]:
    for one in scene.objects:
        if one.colour_shape not in question.relevant_pairs:
            continue
        if question.type == "colour" or _names(question, one.colour):
            yield Evidence(colour_label(one.cell), frozenset({one.colour}))
        if question.type == "shape" or _names(question, one.shape):
            yield Evidence(shape_label(one.cell), frozenset({one.shape}))


def _counted_evidence(scene: RenderedScene, question: SceneQuestion) -> Iterator[Evidence]:
    """Yield one for each quarter: values that are counted, where its object is, else the others."""
    colour, shape = question.relevant_pairs[0]
    label, counted = shape_label, frozenset({shape})
    if question.text == TOTAL_QUESTIONS[question.language]:
        counted = _ANY_VALUE[label]
    elif _names(question, colour):
        label, counted = colour_label, frozenset({colour})
    others = _ANY_VALUE[label] - counted | {EMPTY_CELL}
    by_cell = {one.cell: one for one in scene.objects}
    for cell in range(CELL_COUNT):
        value = _value_of(by_cell.get(cell), label is colour_label)
        yield Evidence(label(cell), counted if value in counted else others)


def _value_of(scene_object: SceneObject | None, is_colour: bool) -> str:
    if scene_object is None:
        return EMPTY_CELL
    return scene_object.colour if is_colour else scene_object.shape


def _names(question: SceneQuestion, word: str) -> bool:
    return (CHINESE_WORDS[word] if question.language == "zh" else word) in question.text
