"""The embedded data: rendered scenes with captions and questions, and two held-out sets.

Everything is a pure function of (seed, index). Held-out pictures come from streams of their own,
which training never draws from; `unseen` asks about colour-shape pairs that training never shows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from vlbench.data.sample import IMAGE_PLACEHOLDER, ChatTurn, Sample
from vlbench.data.scene_text import (
    LANGUAGES,
    QUESTION_TYPES,
    SIDE_ANSWERS,
    TOTAL_QUESTIONS,
    SceneQuestion,
    format_count_answer,
    list_questions,
    pick_questions,
    scene_caption,
)
from vlbench.data.scene_world import UNSEEN_PAIRS, RenderedScene, make_scene

CAPTION_PROMPTS = {"en": "Describe the picture.", "zh": "描述这张图片。"}
HeldOutKind = Literal["new", "unseen"]
_QUESTIONS_PER_TYPE = {"new": 240, "unseen": 120}


@dataclass(frozen=True)
class HeldOutSceneQuestion:
    """One held-out question; `type` is one of `scene_text.TYPES`."""

    id: str
    image: RenderedScene
    text: str
    answer: str
    type: str
    language: str

    def to_sample(self) -> Sample:
        """Give the question and its answer as a conversation."""
        turns = (
            ChatTurn("human", f"{IMAGE_PLACEHOLDER}\n{self.text}"),
            ChatTurn("assistant", self.answer),
        )
        return Sample(self.id, turns, (self.image,), self.language)


class SceneCaptions:
    """A source: one picture and its caption per sample, half of them English, half Chinese."""

    def __init__(self, seed: int, sample_count: int) -> None:
        self.name = "scene captions"
        self._seed, self._sample_count = seed, sample_count

    def __len__(self) -> int:
        return self._sample_count

    def __getitem__(self, index: int) -> Sample:
        """Make sample `index`; raise IndexError beyond the end."""
        _check_sample_index(index, self._sample_count)
        picture = make_scene("captions", self._seed, index)
        language = LANGUAGES[random.Random(f"captions/{self._seed}/{index}").randrange(2)]
        turns = (
            ChatTurn("human", f"{IMAGE_PLACEHOLDER}\n{CAPTION_PROMPTS[language]}"),
            ChatTurn("assistant", scene_caption(picture, language)),
        )
        return Sample(f"caption-{self._seed}-{index}", turns, (picture,), language)


class SceneConversations:
    """A source: one picture and several questions about it per sample, in one language."""

    def __init__(self, seed: int, sample_count: int, question_count: int) -> None:
        self.name = "scene conversations"
        self._seed, self._sample_count, self._question_count = seed, sample_count, question_count

    def __len__(self) -> int:
        return self._sample_count

    def __getitem__(self, index: int) -> Sample:
        """Make sample `index`; raise IndexError beyond the end."""
        _check_sample_index(index, self._sample_count)
        picture = make_scene("conversations", self._seed, index)
        rng = random.Random(f"conversations/{self._seed}/{index}")
        language = rng.choice(LANGUAGES)
        turns: list[ChatTurn] = []
        for asked in pick_questions(rng, list_questions(picture, language), self._question_count):
            before = "" if turns else f"{IMAGE_PLACEHOLDER}\n"
            turns += [ChatTurn("human", before + asked.text), ChatTurn("assistant", asked.answer)]
        name = f"conversation-{self._seed}-{index}"
        return Sample(name, tuple(turns), (picture,), language)


@cache
def held_out_questions(kind: HeldOutKind) -> tuple[HeldOutSceneQuestion, ...]:
    """Give the held-out questions, always the same: "new" pictures (1200) or "unseen" pairs (600).

    Types, languages and answers take turns, so any beginning of the list is balanced.
    """
    rng = random.Random(f"held-out/{kind}")
    scenes = _generate_scenes(kind)
    found = []
    for number in range(_QUESTIONS_PER_TYPE[kind] * len(QUESTION_TYPES)):
        slot, place = divmod(number, len(QUESTION_TYPES))
        asked, language = QUESTION_TYPES[place], LANGUAGES[slot % 2]
        wanted = _wanted_answer(asked, language, slot // 2)
        total = asked == "count" and kind == "new" and slot // 8 % 3 == 0
        picture, one = next(
            (picture, fit)
            for picture in scenes
            for fit in _fitting_questions(rng, picture, asked, language, wanted)
            if (fit.text == TOTAL_QUESTIONS[language]) == total
            and (kind == "new" or _is_about_unseen_pair(fit))
        )
        name = f"{kind}-{number}"
        found.append(HeldOutSceneQuestion(name, picture, one.text, one.answer, asked, language))
    return tuple(found)


def _generate_scenes(kind: HeldOutKind) -> Iterator[RenderedScene]:
    index = 0
    while True:
        yield make_scene(kind, 0, index, has_unseen_pair=kind == "unseen")
        index += 1


def _wanted_answer(question_type: str, language: str, cycle_number: int) -> str | None:
    """Give the answer whose turn it is; None where answers come out even by themselves."""
    if question_type == "count":
        return format_count_answer(cycle_number % 4 + 1, language)
    if question_type == "relation":
        return SIDE_ANSWERS[language][cycle_number % 4]
    return None


def _fitting_questions(
    rng: random.Random,
    rendered_scene: RenderedScene,
    question_type: str,
    language: str,
    answer: str | None,
) -> list[SceneQuestion]:
    """List the questions about the picture of this type and answer, in random order."""
    fit = [q for q in list_questions(rendered_scene, language) if q.type == question_type]
    fit = [q for q in fit if answer in (None, q.answer)]
    return rng.sample(fit, len(fit))


def _is_about_unseen_pair(question: SceneQuestion) -> bool:
    return any(UNSEEN_PAIRS[colour] == shape for colour, shape in question.relevant_pairs)


def _check_sample_index(index: int, sample_count: int) -> None:
    if not 0 <= index < sample_count:
        raise IndexError(f"sample {index} of {sample_count}")
