"""Samples of the family many: two to four gist pictures, and questions about one of them.

Every question fits another picture too, with another answer: who takes the wrong picture is wrong.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from vlbench.data.sample import IMAGE_PLACEHOLDER
from vlbench.data.scene_text import SceneQuestion, list_questions
from vlbench.data.scene_world import RenderedScene, make_scene

MIN_PICTURES, MAX_PICTURES = 2, 4
ASKED_TYPES = ("colour", "shape", "position")  # of gist, that are asked about one of the pictures
PICTURE_NAMES = {
    "en": ("first picture", "second picture", "third picture", "fourth picture"),
    "zh": ("第一张图", "第二张图", "第三张图", "第四张图"),
}


def make_album(stream: str, seed: int, index: int) -> tuple[RenderedScene, ...]:
    """Make the pictures of album `index` of a stream; at least one question can be asked."""
    rng = random.Random(f"album/{stream}/{seed}/{index}")
    while True:
        count, salt = rng.randint(MIN_PICTURES, MAX_PICTURES), rng.randrange(10**9)
        album = tuple(
            make_scene(f"album-{stream}-{seed}-{index}", salt, number) for number in range(count)
        )
        if list_album_questions(album, "en"):
            return album


def list_album_questions(album: Sequence[RenderedScene], language: str) -> list[SceneQuestion]:
    """List the questions about each picture that another one answers differently."""
    by_picture = [
        {q.text: q for q in list_questions(scene, language) if q.type in ASKED_TYPES}
        for scene in album
    ]
    return [
        SceneQuestion(
            "many",
            language,
            _name_picture(text, number, language),
            q.answer,
            q.relevant_pairs,
            picture=number,
        )
        for number, asked in enumerate(by_picture)
        for text, q in asked.items()
        if any(text in other and other[text].answer != q.answer for other in by_picture)
    ]


def _name_picture(question: str, number: int, language: str) -> str:
    name = PICTURE_NAMES[language][number]
    return f"{name}里{question}" if language == "zh" else f"{question[:-1]} in the {name}?"


def album_heading(picture_texts: Sequence[str], language: str) -> str:
    """Return the lines that show each picture after its name, with a line break at the end.

    `picture_texts` are placeholders of images, or what stands for them.
    """
    names = PICTURE_NAMES[language]
    lead = "" if language == "zh" else "The "
    colon = "：" if language == "zh" else ": "
    return "".join(
        f"{lead}{name}{colon}{text}\n" for name, text in zip(names, picture_texts, strict=False)
    )


def image_heading(count: int, language: str) -> str:
    """Return the placeholders of the images of a question, and a line break."""
    if count == 1:
        return f"{IMAGE_PLACEHOLDER}\n"
    return album_heading([IMAGE_PLACEHOLDER] * count, language)
