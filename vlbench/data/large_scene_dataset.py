"""Training sources of large scenes: captions and conversations, pure functions of (seed, index)."""

from __future__ import annotations

import random

from vlbench.data.large_scenes import (
    LARGE_SIDE,
    large_caption,
    list_large_questions,
    make_large_scene,
)
from vlbench.data.sample import Sample
from vlbench.data.scene_dataset import SceneSource, caption_turns, question_turns
from vlbench.data.scene_families import draw_family
from vlbench.data.scene_text import LANGUAGES
from vlbench.data.scene_world import RenderedScene

LARGE_WEIGHTS = {"letters": 3, "shapes": 1}  # training pictures; of shapes all are soon asked


class LargeSceneCaptions(SceneSource):
    """A source: one large scene and its caption per sample, English or Chinese."""

    name = "large scene captions"

    def __init__(self, seed: int, sample_count: int, side: int = LARGE_SIDE) -> None:
        super().__init__(seed, sample_count)
        self._side = side

    def make_sample(self, index: int) -> Sample:
        """Make sample `index`."""
        rng = random.Random(f"large captions/{self.seed}/{index}")
        language, scene = _draw_scene(rng, "captions", self.seed, index, self._side)
        turns = caption_turns(large_caption(scene, language), language)
        return Sample(f"large-caption-{self.seed}-{index}", turns, (scene,), language)


class LargeSceneConversations(SceneSource):
    """A source: questions about one large scene per sample, at most `question_count`.

    An object is asked about once: "the black object" tells nothing of what is asked later.
    """

    name = "large scene conversations"

    def __init__(
        self, seed: int, sample_count: int, question_count: int, side: int = LARGE_SIDE
    ) -> None:
        super().__init__(seed, sample_count)
        self._question_count, self._side = question_count, side

    def make_sample(self, index: int) -> Sample:
        """Make sample `index`."""
        rng = random.Random(f"large conversations/{self.seed}/{index}")
        language, scene = _draw_scene(rng, "conversations", self.seed, index, self._side)
        candidates = list_large_questions(scene, language)
        rng.shuffle(candidates)
        by_object = {question.relevant_pairs: question for question in candidates}
        asked = list(by_object.values())[: self._question_count]
        turns = question_turns(asked, 1, language)
        return Sample(f"large-conversation-{self.seed}-{index}", turns, (scene,), language)


def _draw_scene(
    rng: random.Random, stream: str, seed: int, index: int, side: int
) -> tuple[str, RenderedScene]:
    """Draw a language and a family; return the language and the scene."""
    language, family = rng.choice(LANGUAGES), draw_family(rng, LARGE_WEIGHTS)
    return language, make_large_scene(family, stream, seed, index, side)
