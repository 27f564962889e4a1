"""Training sources of rendered scenes: captions and conversations. `scene_exam` has the questions.

Everything is a pure function of (seed, index).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

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
from vlbench.data.scene_text import LANGUAGES, SceneQuestion, pick_questions
from vlbench.data.scene_world import IMAGE_SIDE

CAPTION_PROMPTS = {"en": "Describe the picture.", "zh": "描述这张图片。"}
SMALL_IMAGE_WEIGHTS = {"gist": 1}  # at fewer pixels than IMAGE_SIDE the rest cannot be seen


class SceneSource:
    """A source of rendered samples: a subclass has its `name`, and makes a sample of its index."""

    name: str

    def __init__(self, seed: int, sample_count: int) -> None:
        self.seed, self._sample_count = seed, sample_count

    def __len__(self) -> int:
        return self._sample_count

    def __getitem__(self, index: int) -> Sample:
        """Make sample `index`; raise IndexError beyond the end."""
        if not 0 <= index < self._sample_count:
            raise IndexError(f"sample {index} of {self._sample_count}")
        return self.make_sample(index)

    def make_sample(self, index: int) -> Sample:
        """Make sample `index`, which is one of the source."""
        raise NotImplementedError


class SceneCaptions(SceneSource):
    """A source: one image and its caption per sample, half of them English, half Chinese."""

    name = "scene captions"

    def __init__(self, seed: int, sample_count: int, image_size: int = IMAGE_SIDE) -> None:
        super().__init__(seed, sample_count)
        self._weights = CAPTION_WEIGHTS if image_size >= IMAGE_SIDE else SMALL_IMAGE_WEIGHTS

    def make_sample(self, index: int) -> Sample:
        """Make sample `index`."""
        rng = random.Random(f"captions/{self.seed}/{index}")
        language, family = rng.choice(LANGUAGES), draw_family(rng, self._weights)
        has_dot = rng.random() < DOT_SHARE
        [scene] = make_pictures(family, "captions", self.seed, index, has_dot)
        turns = caption_turns(picture_caption(scene, language), language)
        return Sample(f"caption-{self.seed}-{index}", turns, (scene,), language)


class SceneConversations(SceneSource):
    """A source: several questions about one image, or one album, per sample, in one language."""

    name = "scene conversations"

    def __init__(
        self, seed: int, sample_count: int, question_count: int, image_size: int = IMAGE_SIDE
    ) -> None:
        super().__init__(seed, sample_count)
        self._question_count = question_count
        self._weights = FAMILY_WEIGHTS if image_size >= IMAGE_SIDE else SMALL_IMAGE_WEIGHTS

    def make_sample(self, index: int) -> Sample:
        """Make sample `index`."""
        rng = random.Random(f"conversations/{self.seed}/{index}")
        language, family = rng.choice(LANGUAGES), draw_family(rng, self._weights)
        has_dot = rng.random() < DOT_SHARE
        pictures = make_pictures(family, "conversations", self.seed, index, has_dot)
        candidates = list_picture_questions(pictures, language)
        if not candidates:  # few objects that stand apart, one in 2,600 of a lattice: one has a dot
            pictures = make_pictures(family, "conversations", self.seed, index, has_dot=True)
            candidates = list_picture_questions(pictures, language)
        picked = pick_questions(rng, candidates, self._question_count)
        turns = question_turns(picked, len(pictures), language)
        return Sample(f"conversation-{self.seed}-{index}", turns, pictures, language)


def caption_turns(caption: str, language: str) -> tuple[ChatTurn, ...]:
    """Return the turns of one image with its caption."""
    asked = f"{IMAGE_PLACEHOLDER}\n{CAPTION_PROMPTS[language]}"
    return ChatTurn("human", asked), ChatTurn("assistant", caption)


def question_turns(
    questions: Sequence[SceneQuestion], picture_count: int, language: str
) -> tuple[ChatTurn, ...]:
    """Return the turns of questions with their answers; the first one shows all pictures."""
    turns: list[ChatTurn] = []
    for question in questions:
        heading = "" if turns else image_heading(picture_count, language)
        turns.append(ChatTurn("human", heading + question.text))
        turns.append(ChatTurn("assistant", question.answer))
    return tuple(turns)
