"""Training sources of large scenes: captions and conversations, pure functions of (seed, index)."""

from __future__ import annotations

import random

from vlbench.data.large_scenes import (
    LARGE_SIDE,
    large_caption,
    list_large_questions,
    make_large_scene,
)
from vlbench.data.sample import IMAGE_PLACEHOLDER, ChatTurn, Sample
from vlbench.data.scene_albums import image_heading
from vlbench.data.scene_dataset import CAPTION_PROMPTS, check_sample_index
from vlbench.data.scene_families import draw_family
from vlbench.data.scene_text import LANGUAGES
from vlbench.data.scene_world import RenderedScene

LARGE_WEIGHTS = {"letters": 3, "shapes": 1}  # training pictures; of shapes all are soon asked


class LargeSceneCaptions:
    """A source: one large scene and its caption per sample, English or Chinese."""

    def __init__(self, seed: int, sample_count: int, side: int = LARGE_SIDE) -> None:
        self.name = "large scene captions"
        self._seed, self._sample_count, self._side = seed, sample_count, side

    def __len__(self) -> int:
        return self._sample_count

    def __getitem__(self, index: int) -> Sample:
        """Make sample `index`; raise IndexError beyond the end."""
        check_sample_index(index, self._sample_count)
        rng = random.Random(f"large captions/{self._seed}/{index}")
        language, scene = _draw_scene(rng, "captions", self._seed, index, self._side)
        turns = (
            ChatTurn("human", f"{IMAGE_PLACEHOLDER}\n{CAPTION_PROMPTS[language]}"),
            ChatTurn("assistant", large_caption(scene, language)),
        )
        return Sample(f"large-caption-{self._seed}-{index}", turns, (scene,), language)


class LargeSceneConversations:
    """A source: questions about one large scene per sample, at most `question_count`.

    An object is asked about once: "the black object" tells nothing of what is asked later.
    """

    def __init__(
        self, seed: int, sample_count: int, question_count: int, side: int = LARGE_SIDE
    ) -> None:
        self.name = "large scene conversations"
        self._seed, self._sample_count, self._side = seed, sample_count, side
        self._question_count = question_count

    def __len__(self) -> int:
        return self._sample_count

    def __getitem__(self, index: int) -> Sample:
        """Make sample `index`; raise IndexError beyond the end."""
        check_sample_index(index, self._sample_count)
        rng = random.Random(f"large conversations/{self._seed}/{index}")
        language, scene = _draw_scene(rng, "conversations", self._seed, index, self._side)
        candidates = list_large_questions(scene, language)
        rng.shuffle(candidates)
        by_object = {question.relevant_pairs: question for question in candidates}
        turns: list[ChatTurn] = []
        for question in list(by_object.values())[: self._question_count]:
            heading = "" if turns else image_heading(1, language)
            turns.append(ChatTurn("human", heading + question.text))
            turns.append(ChatTurn("assistant", question.answer))
        return Sample(f"large-conversation-{self._seed}-{index}", tuple(turns), (scene,), language)


def _draw_scene(
    rng: random.Random, stream: str, seed: int, index: int, side: int
) -> tuple[str, RenderedScene]:
    """Draw a language and a family; return the language and the scene."""
    language, family = rng.choice(LANGUAGES), draw_family(rng, LARGE_WEIGHTS)
    return language, make_large_scene(family, stream, seed, index, side)
