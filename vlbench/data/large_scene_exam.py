"""The fixed held-out questions about large scenes, the same number of each family and height."""

from __future__ import annotations

import random
from functools import cache

from vlbench.data.large_scenes import (
    HEIGHT_BANDS,
    LARGE_FAMILIES,
    LARGE_SIDE,
    list_large_questions,
    make_large_scene,
    question_type,
)
from vlbench.data.scene_exam import HeldOutSceneQuestion
from vlbench.data.scene_text import LANGUAGES

QUESTIONS_PER_BAND = 100  # of a family


@cache
def large_held_out_questions(side: int = LARGE_SIDE) -> tuple[HeldOutSceneQuestion, ...]:
    """Return 1000 questions about scenes of `side` pixels, one about each.

    Families, heights and languages alternate, so any prefix of the list is balanced.
    """
    questions = []
    for index in range(QUESTIONS_PER_BAND * len(HEIGHT_BANDS)):
        language = LANGUAGES[index // len(HEIGHT_BANDS) % 2]
        for family in LARGE_FAMILIES:
            scene = make_large_scene(family, "new", 0, index, side)
            rng = random.Random(f"held-out/large {family}/{index}")
            asked = rng.choice(list_large_questions(scene, language))
            questions.append(
                HeldOutSceneQuestion(
                    f"new-{family}-{index}",
                    (scene,),
                    asked.text,
                    asked.answer,
                    question_type(scene),
                    language,
                )
            )
    return tuple(questions)
