"""The fixed held-out questions about rendered pictures: six families, and unseen pairs.

Their images come from streams of their own, which training never draws from. "new" asks each family
as often; "unseen" asks gist questions about colour-shape pairs that are never trained on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Literal

from vlbench.data.picture_labels import Evidence
from vlbench.data.sample import ChatTurn, Sample
from vlbench.data.scene_albums import image_heading
from vlbench.data.scene_families import (
    FAMILIES,
    family_of,
    list_picture_questions,
    make_pictures,
)
from vlbench.data.scene_labels import question_evidence
from vlbench.data.scene_text import (
    LANGUAGES,
    QUESTION_TYPES,
    SIDE_ANSWERS,
    TOTAL_QUESTIONS,
    SceneQuestion,
    format_count_answer,
    list_questions,
)
from vlbench.data.scene_world import UNSEEN_PAIRS, RenderedScene, make_scene

HeldOutKind = Literal["new", "unseen"]
QUESTIONS_PER_FAMILY = 300
_UNSEEN_QUESTIONS = 600


@dataclass(frozen=True)
class HeldOutSceneQuestion:
    """One held-out question."""

    id: str
    images: tuple[RenderedScene, ...]
    text: str  # the question alone, without its images
    answer: str
    type: str  # one of `scene_text.QUESTION_TYPES`, or a family other than gist
    language: str

    @property
    def family(self) -> str:
        """One of FAMILIES."""
        return family_of(self.type)

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """What must be read of the images for the right answer; () for large scenes."""
        if self.family not in FAMILIES:
            return ()
        return question_evidence(self.images, self.type, self.language, self.text)

    def to_sample(self) -> Sample:
        """Return the question and its answer as a conversation."""
        turns = (
            ChatTurn("human", image_heading(len(self.images), self.language) + self.text),
            ChatTurn("assistant", self.answer),
        )
        return Sample(self.id, turns, self.images, self.language)


@cache
def held_out_questions(kind: HeldOutKind) -> tuple[HeldOutSceneQuestion, ...]:
    """Return the fixed held-out questions: on "new" images (1800) or "unseen" pairs (600).

    Families, types, languages and answers alternate, so any prefix of the list is balanced.
    """
    if kind == "unseen":
        return tuple(_ask_gist(kind, _UNSEEN_QUESTIONS))
    asked = [
        _ask_gist(kind, QUESTIONS_PER_FAMILY)
        if family == "gist"
        else _ask_family(family, QUESTIONS_PER_FAMILY)
        for family in FAMILIES
    ]
    return tuple(question for row in zip(*asked, strict=True) for question in row)


def _ask_family(family: str, question_count: int) -> Iterator[HeldOutSceneQuestion]:
    """Give one question about each new picture, in both languages in turns."""
    indices = count()
    for number in range(question_count):
        language = LANGUAGES[number % 2]
        asked: list[SceneQuestion] = []
        while not asked:
            index = next(indices)
            pictures = make_pictures(family, f"new-{family}", 0, index, has_dot=family == "fine")
            asked = [q for q in list_picture_questions(pictures, language) if q.type == family]
        question = random.Random(f"held-out/{family}/{number}").choice(asked)
        yield HeldOutSceneQuestion(
            f"new-{family}-{number}", pictures, question.text, question.answer, family, language
        )


def _ask_gist(kind: HeldOutKind, question_count: int) -> Iterator[HeldOutSceneQuestion]:
    """Give one question about each new scene, all types in turns."""
    rng = random.Random(f"held-out/{kind}")
    scenes = (make_scene(kind, 0, index, has_unseen_pair=kind == "unseen") for index in count())
    for number in range(question_count):
        cycle, type_index = divmod(number, len(QUESTION_TYPES))
        question_type, language = QUESTION_TYPES[type_index], LANGUAGES[cycle % 2]
        answer = _required_answer(question_type, language, cycle // 2)
        asks_total = question_type == "count" and kind == "new" and cycle // 8 % 3 == 0
        scene, question = next(
            (scene, candidate)
            for scene in scenes
            for candidate in _matching_questions(rng, scene, question_type, language, answer)
            if (candidate.text == TOTAL_QUESTIONS[language]) == asks_total
            and (kind == "new" or _is_about_unseen_pair(candidate))
        )
        yield HeldOutSceneQuestion(
            f"{kind}-gist-{number}",
            (scene,),
            question.text,
            question.answer,
            question_type,
            language,
        )


def _required_answer(question_type: str, language: str, cycle_number: int) -> str | None:
    """Return the next answer in rotation; None for types with balanced answers anyway."""
    if question_type == "count":
        return format_count_answer(cycle_number % 4 + 1, language)
    if question_type == "relation":
        return SIDE_ANSWERS[language][cycle_number % 4]
    return None


def _matching_questions(
    rng: random.Random,
    rendered_scene: RenderedScene,
    question_type: str,
    language: str,
    answer: str | None,
) -> list[SceneQuestion]:
    """Return the questions about a scene of this type and answer, in random order."""
    matching = [q for q in list_questions(rendered_scene, language) if q.type == question_type]
    matching = [q for q in matching if answer in (None, q.answer)]
    return rng.sample(matching, len(matching))


def _is_about_unseen_pair(question: SceneQuestion) -> bool:
    return any(UNSEEN_PAIRS[colour] == shape for colour, shape in question.relevant_pairs)
