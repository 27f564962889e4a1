"""Training sources of rendered scenes: captions and conversations. `scene_exam` has the questions.

Everything is a pure function of (seed, index).
"""

from __future__ import annotations

import random

from vlbench.data.sample import IMAGE_PLACEHOLDER, ChatTurn, Sample
from vlbench.data.scene_albums import image_heading
from vlbench.data.scene_families import (
    CAPTION_WEIGHTS,
    DOT_SHARE,
    FAMILY_WEIGHTS,
    draw_family,
    list_picture_questions,
    make_pictures,
    picture_caption,
)
from vlbench.data.scene_text import LANGUAGES, pick_questions
from vlbench.data.scene_world import IMAGE_SIDE

CAPTION_PROMPTS = {"en": "Describe the picture.", "zh": "描述这张图片。"}
SMALL_IMAGE_WEIGHTS = {"gist": 1}  # at fewer pixels than IMAGE_SIDE the rest cannot be seen


class SceneCaptions:
    """A source: one image and its caption per sample, half of them English, half Chinese."""

    def __init__(self, seed: int, sample_count: int, image_size: int = IMAGE_SIDE) -> None:
        self.name = "scene captions"
        self._seed, self._sample_count = seed, sample_count
        self._weights = CAPTION_WEIGHTS if image_size >= IMAGE_SIDE else SMALL_IMAGE_WEIGHTS

    def __len__(self) -> int:
        return self._sample_count

    def __getitem__(self, index: int) -> Sample:
        """Make sample `index`; raise IndexError beyond the end."""
        check_sample_index(index, self._sample_count)
        rng = random.Random(f"captions/{self._seed}/{index}")
        language, family = rng.choice(LANGUAGES), draw_family(rng, self._weights)
        has_dot = rng.random() < DOT_SHARE
        [scene] = make_pictures(family, "captions", self._seed, index, has_dot)
        turns = (
            ChatTurn("human", f"{IMAGE_PLACEHOLDER}\n{CAPTION_PROMPTS[language]}"),
            ChatTurn("assistant", picture_caption(scene, language)),
        )
        return Sample(f"caption-{self._seed}-{index}", turns, (scene,), language)


class SceneConversations:
    """A source: several questions about one image, or one album, per sample, in one language."""

    def __init__(
        self, seed: int, sample_count: int, question_count: int, image_size: int = IMAGE_SIDE
    ) -> None:
        self.name = "scene conversations"
        self._seed, self._sample_count, self._question_count = seed, sample_count, question_count
        self._weights = FAMILY_WEIGHTS if image_size >= IMAGE_SIDE else SMALL_IMAGE_WEIGHTS

    def __len__(self) -> int:
        return self._sample_count

    def __getitem__(self, index: int) -> Sample:
        """Make sample `index`; raise IndexError beyond the end."""
        check_sample_index(index, self._sample_count)
        rng = random.Random(f"conversations/{self._seed}/{index}")
        language, family = rng.choice(LANGUAGES), draw_family(rng, self._weights)
        has_dot = rng.random() < DOT_SHARE
        pictures = make_pictures(family, "conversations", self._seed, index, has_dot)
        turns: list[ChatTurn] = []
        candidates = list_picture_questions(pictures, language)
        for question in pick_questions(rng, candidates, self._question_count):
            heading = "" if turns else image_heading(len(pictures), language)
            turns.append(ChatTurn("human", heading + question.text))
            turns.append(ChatTurn("assistant", question.answer))
        return Sample(f"conversation-{self._seed}-{index}", tuple(turns), pictures, language)


def check_sample_index(index: int, sample_count: int) -> None:
    """Raise IndexError beyond the end of a source."""
    if not 0 <= index < sample_count:
        raise IndexError(f"sample {index} of {sample_count}")
