"""Skills that the miniature language model learns from text, each from documents of its own.

A document of a skill is one picture, or an album, told in words and a few short answers about it:
either facts ("the red star at 3c.") or the questions that are asked of images.
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
from vlbench.data.scene_letters import LETTER_GRID
from vlbench.data.scene_text import (
    TOTAL_QUESTIONS,
    SceneQuestion,
    draw_question,
    object_name,
)
from vlbench.data.scene_world import RenderedScene
from vlbench.miniatures.told_pictures import describe_in_rasters, describe_line

TEXT_SCENE_STREAM = "words"  # stream of scenes; the images of fit come from others
TextPiece = tuple[str, bool]  # text, and whether it is supervised
WHOLE_RASTER_SHARE = 0.25  # of the letter scenes; of the others the line with the letters is told


class Skill(NamedTuple):
    """What is asked, and in which language."""

    name: str  # a key of ANSWERS_PER_DOCUMENT
    language: str


ANSWERS_PER_DOCUMENT = {
    "what": 5,
    "where": 5,
    "beside": 5,
    "crowd": 4,
    "place": 4,
    "position": 4,
    "colour": 4,
    "shape": 4,
    "relation": 4,
    "count": 4,
    "several": 2,
    "fine": 1,
    "caption": 1,
    "glyphs": 1,
    "many": 4,
}
"""All skills. At most so many answers about a picture, all different: if questions come again, a
language model learns to repeat the answer, and reads no picture."""

FACT_SKILLS = ("what", "where", "beside")
_PLACE_SKILLS = (*FACT_SKILLS, "place", "fine")  # about pictures of the family place
_SEARCH_STRIDE = 10_000_019  # to the next picture where one cannot be asked about


def make_skill_document(
    skill: Skill, grids: Sequence[int], seed: int, index: int
) -> list[TextPiece]:
    """Make document `index` of a skill; rasters have one of `grids` cells along a side."""
    rng = random.Random(f"{skill.name}/{skill.language}/{seed}/{index}")
    grid = rng.choice(grids)
    while True:
        has_dot = skill.name == "fine" or rng.random() < DOT_SHARE
        family = _picture_family(rng, skill.name)
        pictures = make_pictures(family, TEXT_SCENE_STREAM, seed, index, has_dot)
        answers = _draw_answers(rng, pictures, skill)
        if answers:
            return [(_describe_rasters(rng, pictures, skill, grid), False), *answers]
        index += _SEARCH_STRIDE


def _picture_family(rng: random.Random, skill_name: str) -> str:
    if skill_name == "caption":
        return draw_family(rng, CAPTION_WEIGHTS)
    if skill_name in _PLACE_SKILLS:
        return "place"
    return skill_name if skill_name in ("crowd", "glyphs", "many") else "gist"


def _describe_rasters(
    rng: random.Random, pictures: Sequence[RenderedScene], skill: Skill, grid: int
) -> str:
    """Tell pictures as rasters; of letters, which have a cell each, often only their line."""
    if pictures[0].grid != LETTER_GRID:
        return describe_in_rasters(pictures, skill.language, grid)
    if rng.random() < WHOLE_RASTER_SHARE:
        return describe_in_rasters(pictures, skill.language, LETTER_GRID)
    return describe_line(pictures[0]) + "\n"


def _draw_answers(
    rng: random.Random, pictures: Sequence[RenderedScene], skill: Skill
) -> list[TextPiece]:
    """Draw different answers about the pictures; none if the skill does not apply to them."""
    count = ANSWERS_PER_DOCUMENT[skill.name]
    if skill.name == "caption":
        return [(picture_caption(pictures[0], skill.language) + "\n", True)]
    if skill.name in FACT_SKILLS:
        facts = list_facts(pictures[0], skill)
        end = "。" if skill.language == "zh" else "."
        return [
            piece
            for about, told in rng.sample(facts, min(count, len(facts)))
            for piece in ((about, False), (told, True), (end, False))
        ]
    left = list_picture_questions(pictures, skill.language)
    if skill.name == "several":
        left = _count_questions_about_some(left)
    else:
        left = [q for q in left if q.type == skill.name]
    pieces = list[TextPiece]()
    for _ in range(min(count, len(left))):
        asked = draw_question(rng, left)
        left.remove(asked)
        pieces += [(asked.text, False), (f" {asked.answer}", True), ("\n", False)]
    return pieces


def _count_questions_about_some(questions: Sequence[SceneQuestion]) -> list[SceneQuestion]:
    """Return the questions of how many have a colour or shape; none where no two share any."""
    about_some = [
        q for q in questions if q.type == "count" and q.text != TOTAL_QUESTIONS[q.language]
    ]
    return about_some if any(len(q.relevant_pairs) > 1 for q in about_some) else []


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
                _spaced_text(object_name(t, skill.language), zh),
            )
            for t in scene.objects
        ]
    unique = [t for t in scene.objects if names[t.colour_shape] == 1]
    if skill.name == "where":
        return [
            (
                f"{object_name(t, 'zh')}在" if zh else f" the {object_name(t, 'en')} at",
                _spaced_text(coordinate_name(t.cell), zh),
            )
            for t in unique
        ]
    return [
        (
            f"{object_name(t, 'zh')}的{side}在" if zh else f" {side} the {object_name(t, 'en')} at",
            _spaced_text(coordinate_name(other.cell), zh),
        )
        for t in unique
        for side, other in list_neighbours(scene, t, skill.language)
    ]


def _spaced_text(text: str, is_chinese: bool) -> str:
    return text if is_chinese else f" {text}"
