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

from vlbench.data.sample import PLACEHOLDER, Sample, Turn
from vlbench.data.scene_text import (
    LANGUAGES,
    SIDES,
    TOTAL,
    TYPES,
    Asked,
    answer_number,
    caption,
    pick,
    questions,
)
from vlbench.data.scene_world import UNSEEN, Scene, scene

DESCRIBE = {"en": "Describe the picture.", "zh": "描述这张图片。"}
HeldOut = Literal["new", "unseen"]
_PER_TYPE = {"new": 240, "unseen": 120}


@dataclass(frozen=True)
class Question:
    """One held-out question; `type` is one of `scene_text.TYPES`."""

    id: str
    picture: Scene
    text: str
    answer: str
    type: str
    language: str

    def sample(self) -> Sample:
        """Give the question and its answer as a conversation."""
        turns = Turn("human", f"{PLACEHOLDER}\n{self.text}"), Turn("assistant", self.answer)
        return Sample(self.id, turns, (self.picture,), self.language)


class Captions:
    """A source: one picture and its caption per sample, half of them English, half Chinese."""

    def __init__(self, seed: int, samples: int) -> None:
        self.name = "scene captions"
        self._seed, self._samples = seed, samples

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> Sample:
        """Make sample `index`; raise IndexError beyond the end."""
        _check(index, self._samples)
        picture = scene("captions", self._seed, index)
        language = LANGUAGES[random.Random(f"captions/{self._seed}/{index}").randrange(2)]
        turns = (
            Turn("human", f"{PLACEHOLDER}\n{DESCRIBE[language]}"),
            Turn("assistant", caption(picture, language)),
        )
        return Sample(f"caption-{self._seed}-{index}", turns, (picture,), language)


class Conversations:
    """A source: one picture and several questions about it per sample, in one language."""

    def __init__(self, seed: int, samples: int, questions: int) -> None:
        self.name = "scene conversations"
        self._seed, self._samples, self._questions = seed, samples, questions

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> Sample:
        """Make sample `index`; raise IndexError beyond the end."""
        _check(index, self._samples)
        picture = scene("conversations", self._seed, index)
        rng = random.Random(f"conversations/{self._seed}/{index}")
        language = rng.choice(LANGUAGES)
        turns: list[Turn] = []
        for asked in pick(rng, questions(picture, language), self._questions):
            before = "" if turns else f"{PLACEHOLDER}\n"
            turns += [Turn("human", before + asked.text), Turn("assistant", asked.answer)]
        name = f"conversation-{self._seed}-{index}"
        return Sample(name, tuple(turns), (picture,), language)


@cache
def held_out(kind: HeldOut) -> tuple[Question, ...]:
    """Give the held-out questions, always the same: "new" pictures (1200) or "unseen" pairs (600).

    Types, languages and answers take turns, so any beginning of the list is balanced.
    """
    rng = random.Random(f"held-out/{kind}")
    scenes = _scenes(kind)
    found = []
    for number in range(_PER_TYPE[kind] * len(TYPES)):
        slot, place = divmod(number, len(TYPES))
        asked, language = TYPES[place], LANGUAGES[slot % 2]
        wanted = _wanted(asked, language, slot // 2)
        total = asked == "count" and kind == "new" and slot // 8 % 3 == 0
        picture, one = next(
            (picture, fit)
            for picture in scenes
            for fit in _fitting(rng, picture, asked, language, wanted)
            if (fit.text == TOTAL[language]) == total and (kind == "new" or _is_unseen(fit))
        )
        name = f"{kind}-{number}"
        found.append(Question(name, picture, one.text, one.answer, asked, language))
    return tuple(found)


def _scenes(kind: HeldOut) -> Iterator[Scene]:
    index = 0
    while True:
        yield scene(kind, 0, index, unseen=kind == "unseen")
        index += 1


def _wanted(asked: str, language: str, turn: int) -> str | None:
    """Give the answer whose turn it is; None where answers come out even by themselves."""
    if asked == "count":
        return answer_number(turn % 4 + 1, language)
    if asked == "relation":
        return SIDES[language][turn % 4]
    return None


def _fitting(
    rng: random.Random, picture: Scene, asked: str, language: str, answer: str | None
) -> list[Asked]:
    """List the questions about the picture of this type and answer, in random order."""
    fit = [q for q in questions(picture, language) if q.type == asked]
    fit = [q for q in fit if answer in (None, q.answer)]
    return rng.sample(fit, len(fit))


def _is_unseen(asked: Asked) -> bool:
    return any(UNSEEN[colour] == shape for colour, shape in asked.about)


def _check(index: int, samples: int) -> None:
    if not 0 <= index < samples:
        raise IndexError(f"sample {index} of {samples}")
