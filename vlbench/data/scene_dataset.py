"""Datasets of rendered scenes: captions, conversations, and two sets of held-out questions.

Everything is a pure function of (seed, index). Held-out images come from streams of their own,
which training never draws from; `unseen` asks about colour-shape pairs that are never trained on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from vlbench.data.picture_labels import Evidence
from vlbench.data.sample import IMAGE_PLACEHOLDER, ChatTurn, Sample
from vlbench.data.scene_labels import question_evidence
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
    """One held-out question; `type` is one of `scene_text.QUESTION_TYPES`."""

    id: str
    image: RenderedScene
    text: str
    answer: str
    type: str
    language: str

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """What must be read of the image for the right answer."""
        return question_evidence(self.image, self.type, self.language, self.text)

    def to_sample(self) -> Sample:
        """Return the question and its answer as a conversation."""
        turns = (
            ChatTurn("human", f"{IMAGE_PLACEHOLDER}\n{self.text}"),
            ChatTurn("assistant", self.answer),
        )
        return Sample(self.id, turns, (self.image,), self.language)


class SceneCaptions:
    """A source: one image and its caption per sample, half of them English, half Chinese."""

    def __init__(self, seed: int, sample_count: int) -> None:
        self.name = "scene captions"
        self._seed, self._sample_count = seed, sample_count

    def __len__(self) -> int:
        return self._sample_count

    def __getitem__(self, index: int) -> Sample:
        """Make sample `index`; raise IndexError beyond the end."""
        _check_sample_index(index, self._sample_count)
        scene = make_scene("captions", self._seed, index)
        language = LANGUAGES[random.Random(f"captions/{self._seed}/{index}").randrange(2)]
        turns = (
            ChatTurn("human", f"{IMAGE_PLACEHOLDER}\n{CAPTION_PROMPTS[language]}"),
            ChatTurn("assistant", scene_caption(scene, language)),
        )
        return Sample(f"caption-{self._seed}-{index}", turns, (scene,), language)


class SceneConversations:
    """A source: one image and several questions about it per sample, in one language."""

    def __init__(self, seed: int, sample_count: int, question_count: int) -> None:
        self.name = "scene conversations"
        self._seed, self._sample_count, self._question_count = seed, sample_count, question_count

    def __len__(self) -> int:
        return self._sample_count

    def __getitem__(self, index: int) -> Sample:
        """Make sample `index`; raise IndexError beyond the end."""
        _check_sample_index(index, self._sample_count)
        scene = make_scene("conversations", self._seed, index)
        rng = random.Random(f"conversations/{self._seed}/{index}")
        language = rng.choice(LANGUAGES)
        turns: list[ChatTurn] = []
        candidates = list_questions(scene, language)
        for question in pick_questions(rng, candidates, self._question_count):
            tag = "" if turns else f"{IMAGE_PLACEHOLDER}\n"
            turns.append(ChatTurn("human", tag + question.text))
            turns.append(ChatTurn("assistant", question.answer))
        return Sample(f"conversation-{self._seed}-{index}", tuple(turns), (scene,), language)


@cache
def held_out_questions(kind: HeldOutKind) -> tuple[HeldOutSceneQuestion, ...]:
    """Return the fixed held-out questions: on "new" images (1200) or "unseen" pairs (600).

    Types, languages and answers alternate, so any prefix of the list is balanced.
    """
    rng = random.Random(f"held-out/{kind}")
    scenes = _generate_scenes(kind)
    questions = []
    for number in range(_QUESTIONS_PER_TYPE[kind] * len(QUESTION_TYPES)):
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
        questions.append(
            HeldOutSceneQuestion(
                id=f"{kind}-{number}",
                image=scene,
                text=question.text,
                answer=question.answer,
                type=question_type,
                language=language,
            )
        )
    return tuple(questions)


def _generate_scenes(kind: HeldOutKind) -> Iterator[RenderedScene]:
    index = 0
    while True:
        yield make_scene(kind, 0, index, has_unseen_pair=kind == "unseen")
        index += 1


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


def _check_sample_index(index: int, sample_count: int) -> None:
    if not 0 <= index < sample_count:
        raise IndexError(f"sample {index} of {sample_count}")
