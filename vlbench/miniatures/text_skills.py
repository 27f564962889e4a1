"""Skills that the miniature language model learns from text, each from documents of its own.

A document of a skill is one or several pictures told in words and many short answers about them:
either facts ("the red star at 3c.") or the questions that are asked of images. Almost all of what
is read back is answer, so a single skill is learned in a few hundred steps.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from vlbench.data.scene_families import (
    CAPTION_WEIGHTS,
    DOT_SHARE,
    draw_family,
    list_picture_questions,
    make_pictures,
    picture_caption,
)
from vlbench.data.scene_lattice_text import coordinate_name, list_neighbours
from vlbench.data.scene_letters import LETTER_GRID, list_letter_questions, make_letter_scene
from vlbench.data.scene_text import SceneQuestion, draw_question, object_name
from vlbench.data.scene_world import RenderedScene
from vlbench.miniatures.told_pictures import describe_in_rasters, describe_line, describe_raster

TEXT_SCENE_STREAM = "words"  # stream of scenes; the images of fit come from others
TextPiece = tuple[str, bool]  # text, and whether it is supervised
WHOLE_RASTER_SHARE = 0.25  # of the letter scenes; of the others the line with the letters is told


class Skill(NamedTuple):
    """What is asked, and in which language."""

    name: str  # a key of ANSWERS_PER_DOCUMENT
    language: str


ANSWERS_PER_DOCUMENT = {
    "what": 12,
    "where": 12,
    "beside": 12,
    "caption": 2,
    "crowd": 12,
    "place": 7,
    "fine": 5,
    "position": 12,
    "colour": 14,
    "shape": 14,
    "relation": 9,
    "count": 13,
    "glyphs": 6,
    "many": 8,
}
"""All skills; so many answers make documents about 130 tokens long, which are batched together."""

FACT_SKILLS = ("what", "where", "beside")
_SEVERAL_PICTURES = ("fine", "glyphs", "caption")  # one answer a picture
_SEARCH_STRIDE = 10_000_019  # to the next picture where one cannot be asked about


def make_skill_document(
    skill: Skill, grids: Sequence[int], seed: int, index: int
) -> list[TextPiece]:
    """Make document `index` of a skill; rasters have one of `grids` cells along a side."""
    rng = random.Random(f"{skill.name}/{skill.language}/{seed}/{index}")
    grid, count = rng.choice(grids), ANSWERS_PER_DOCUMENT[skill.name]
    if skill.name in _SEVERAL_PICTURES:
        return [
            piece
            for number in range(count)
            for piece in _one_answer(rng, skill, grid, seed, index * count + number)
        ]
    while True:
        family = _picture_family(skill.name)
        has_dot = rng.random() < DOT_SHARE
        pictures = make_pictures(family, TEXT_SCENE_STREAM, seed, index, has_dot)
        answers = _list_answers(rng, pictures, skill, count)
        if answers:
            told = describe_in_rasters(pictures, skill.language, grid)
            return [(told, False), *answers]
        index += _SEARCH_STRIDE


def _picture_family(skill_name: str) -> str:
    if skill_name in (*FACT_SKILLS, "crowd", "place"):
        return "crowd"
    return "many" if skill_name == "many" else "gist"


def _list_answers(
    rng: random.Random, pictures: Sequence[RenderedScene], skill: Skill, count: int
) -> list[TextPiece]:
    """Draw `count` answers about the pictures, with repeats; none if the skill does not apply."""
    if skill.name in FACT_SKILLS:
        facts = list_facts(pictures[0], skill)
        drawn = rng.choices(facts, k=count) if facts else []
        return [
            piece
            for about, told in drawn
            for piece in ((about, False), (told, True), (_full_stop(skill.language), False))
        ]
    asked = [q for q in list_picture_questions(pictures, skill.language) if q.type == skill.name]
    if not asked:
        return []
    return [piece for _ in range(count) for piece in _question_pieces(draw_question(rng, asked))]


def _one_answer(
    rng: random.Random, skill: Skill, grid: int, seed: int, index: int
) -> list[TextPiece]:
    """Tell one picture and its only answer: its caption, its letters, or what has a dot."""
    if skill.name == "glyphs":
        scene = make_letter_scene(TEXT_SCENE_STREAM, seed, index)
        is_whole = rng.random() < WHOLE_RASTER_SHARE
        told = describe_raster(scene, LETTER_GRID) if is_whole else describe_line(scene)
        [asked] = list_letter_questions(scene, skill.language)
        return [(f"{told}\n", False), *_question_pieces(asked)]
    is_caption = skill.name == "caption"
    family = draw_family(rng, CAPTION_WEIGHTS) if is_caption else "fine"
    has_dot = not is_caption or rng.random() < DOT_SHARE
    pictures = make_pictures(family, TEXT_SCENE_STREAM, seed, index, has_dot)
    told = describe_in_rasters(pictures, skill.language, max(grid, pictures[0].grid))
    if is_caption:
        return [(told, False), (picture_caption(pictures[0], skill.language) + "\n", True)]
    [asked] = [q for q in list_picture_questions(pictures, skill.language) if q.type == skill.name]
    return [(told, False), *_question_pieces(asked)]


def _question_pieces(asked: SceneQuestion) -> list[TextPiece]:
    return [(asked.text, False), (f" {asked.answer}", True), ("\n", False)]


def list_facts(scene: RenderedScene, skill: Skill) -> list[tuple[str, str]]:
    """List the facts of one kind about a crowded scene: what is given, and what is to be told.

    Objects are named by colour and shape where only one has both.
    """
    zh = skill.language == "zh"
    names = Counter(thing.colour_shape for thing in scene.objects)
    if skill.name == "what":
        return [
            (
                f"{coordinate_name(t.cell)}是" if zh else f" the {coordinate_name(t.cell)} is",
                _told(object_name(t, skill.language), zh),
            )
            for t in scene.objects
        ]
    unique = [t for t in scene.objects if names[t.colour_shape] == 1]
    if skill.name == "where":
        return [
            (
                f"{object_name(t, 'zh')}在" if zh else f" the {object_name(t, 'en')} at",
                _told(coordinate_name(t.cell), zh),
            )
            for t in unique
        ]
    return [
        (
            f"{object_name(t, 'zh')}的{side}在" if zh else f" {side} the {object_name(t, 'en')} at",
            _told(coordinate_name(other.cell), zh),
        )
        for t in unique
        for side, other in list_neighbours(scene, t, skill.language)
    ]


def _told(text: str, is_chinese: bool) -> str:
    return text if is_chinese else f" {text}"


def _full_stop(language: str) -> str:
    return "。" if language == "zh" else "."
