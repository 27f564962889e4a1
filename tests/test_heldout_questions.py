"""Questions with known answers, and the two controls."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import pytest
from PIL import Image
from random_vlm import NoiseImage

from vlbench.config.recipe import load_recipe
from vlbench.data.sample import IMAGE_PLACEHOLDER, ChatTurn, Sample
from vlbench.data.scene_text import QUESTION_TYPES
from vlbench.errors import BadSample
from vlbench.evaluate import heldout_questions
from vlbench.evaluate.heldout_questions import (
    blank_images,
    final_questions,
    scene_questions,
    shuffle_images,
    source_questions,
)
from vlbench.evaluate.run_results import accuracy_by_group, exact_match_accuracy


class Talk:
    """Two conversations about images, one without, one that is bad."""

    name = "talk"

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Sample:
        if index == 3:
            raise BadSample("s3", "is bad")
        tag = f"{IMAGE_PLACEHOLDER}\n" if index < 2 else ""
        turns = (
            ChatTurn("human", f"{tag}first?"),
            ChatTurn("assistant", " one "),
            ChatTurn("human", f"{IMAGE_PLACEHOLDER if index == 1 else ''}second?"),
            ChatTurn("assistant", "two"),
        )
        pictures = tuple(NoiseImage(10 * index + k) for k in range((1, 2, 0)[index]))
        return Sample(f"s{index}", turns, pictures, "en")


def test_every_answer_is_asked_for_with_what_was_said_and_shown_before() -> None:
    questions = source_questions(Talk(), 100)
    assert [q.sample.id for q in questions] == ["s0/1", "s0/3", "s1/1", "s1/3"]
    assert [len(q.sample.turns) for q in questions] == [1, 3, 1, 3]
    assert [len(q.sample.images) for q in questions] == [1, 1, 1, 2]
    assert questions[0].answer == "one"
    assert len(source_questions(Talk(), 3)) == 3


class Pictures:
    """Conversations about a picture, and then some without one."""

    def __init__(self, name: str, count: int, texts: int = 0) -> None:
        self.name, self.count, self.texts = name, count, texts

    def __len__(self) -> int:
        return self.count + self.texts

    def __getitem__(self, index: int) -> Sample:
        pictures = (NoiseImage(index),) if index < self.count else ()
        turns = (
            ChatTurn("human", f"{IMAGE_PLACEHOLDER if pictures else ''}what?"),
            ChatTurn("assistant", "that"),
        )
        return Sample(f"{self.name}{index}", turns, pictures, "en")


@pytest.mark.parametrize(
    ("sizes", "limit", "asked"),
    [
        ((100, 100, 100), 9, (3, 3, 3)),
        ((100, 100, 100), 8, (3, 3, 2)),
        ((100, 1, 100), 9, (4, 1, 4)),
        ((2, 0, 3), 9, (2, 0, 3)),
        ((100, 100, 100), 2, (1, 1, 0)),
        ((1, 1, 100), 4, (1, 1, 2)),
    ],
)
def test_the_questions_of_a_mixture_are_those_of_all_its_sources(
    sizes, limit, asked, monkeypatch
) -> None:
    sources = [Pictures(name, count, texts=2) for name, count in zip("abc", sizes, strict=True)]
    monkeypatch.setattr(
        heldout_questions, "open_stage_sources", lambda _: [(one, 1.0) for one in sources]
    )
    stage_data = load_recipe(["recipe=yivl_llava", "data.train=data.json"]).last_stage_data
    _, questions, _ = final_questions(stage_data, limit)
    ids = [question.sample.id for question in questions]
    assert ids == [f"{n}{k}/1" for n, count in zip("abc", asked, strict=True) for k in range(count)]
    assert [question.record_number for question in questions] == [
        f"{number}.{k}" for number, count in enumerate(asked, 1) for k in range(1, count + 1)
    ]


def test_records_of_a_mixture_are_read_once(monkeypatch) -> None:
    read: Counter[str] = Counter()

    class Counted(Pictures):
        def __getitem__(self, index: int) -> Sample:
            read[f"{self.name}{index}"] += 1
            return super().__getitem__(index)

    sources = [Counted(name, count) for name, count in (("a", 1), ("b", 3), ("c", 90))]
    monkeypatch.setattr(
        heldout_questions, "open_stage_sources", lambda _: [(one, 1.0) for one in sources]
    )
    stage_data = load_recipe(["recipe=yivl_llava", "data.train=data.json"]).last_stage_data
    assert len(final_questions(stage_data, 30)[1]) == 30
    assert len(read) == 30 and set(read.values()) == {1}


@dataclass(frozen=True)
class Copy:
    """A picture that a record has a copy of, as rows of a table have."""

    record: int
    picture: int

    @property
    def name(self) -> str:
        return f"record {self.record}"

    def open(self) -> Image.Image:
        return NoiseImage(self.picture).open()


class Copies(Pictures):
    """Three questions about each picture, in records of their own."""

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        return replace(sample, images=(Copy(index, index // 3),))


def test_questions_about_copies_of_a_picture_are_about_one_picture() -> None:
    questions = source_questions(Copies("a", 9), 100)
    names = [question.picture for question in questions]
    assert names == ["record 0"] * 3 + ["record 3"] * 3 + ["record 6"] * 3
    for before, after in zip(questions, shuffle_images(questions), strict=True):
        (one,), (other,) = before.sample.images, after.sample.images
        assert one.open().tobytes() != other.open().tobytes()


def test_one_picture_is_exchanged_for_no_other() -> None:
    assert shuffle_images(source_questions(Copies("a", 3), 100)) == []


def test_the_controls_change_the_images_and_nothing_else() -> None:
    questions = source_questions(Talk(), 100)
    for control in (shuffle_images(questions), blank_images(questions, (0.5, 0.5, 0.5))):
        for before, after in zip(questions, control, strict=True):
            assert before.sample.turns == after.sample.turns and before.answer == after.answer
            pairs = zip(before.sample.images, after.sample.images, strict=True)
            assert all(one != other for one, other in pairs)
    colours = blank_images(questions, (0.5, 0.5, 0.5))[0].sample.images[0].open().getcolors()
    assert colours == [(28 * 28, (127, 127, 127))]


def test_accuracy_is_the_share_of_answers_that_are_right_word_for_word() -> None:
    questions = source_questions(Talk(), 100)
    answers = ["one", "two", "One", "two"]
    assert exact_match_accuracy(questions, answers) == 0.75
    assert accuracy_by_group(questions, answers, lambda q: q.language) == {"en": 0.75}
    by_question = accuracy_by_group(questions, answers, lambda q: q.answer)
    assert by_question == {"one": 0.5, "two": 1.0}


def test_the_held_out_sets_are_large_enough() -> None:
    new, unseen = scene_questions("new"), scene_questions("unseen")
    assert len(new) >= 1000 and len(unseen) >= 500
    kinds = Counter(q.type for q in new)
    assert all(kinds[kind] >= (60 if kind in QUESTION_TYPES else 300) for kind in kinds)
    assert {q.language for q in new} == {"en", "zh"}
