"""Questions with known answers, and the two controls."""

from __future__ import annotations

from small import Noise

from vlbench.data.sample import PLACEHOLDER, Sample, Turn
from vlbench.evaluate.ask import accuracy, accuracy_by
from vlbench.evaluate.questions import blanked, scene_questions, shuffled, source_questions
from vlbench.mistakes import BadSample


class Talk:
    """Two conversations about pictures, one without, one that is bad."""

    name = "talk"

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Sample:
        if index == 3:
            raise BadSample("s3", "is bad")
        tag = f"{PLACEHOLDER}\n" if index < 2 else ""
        turns = (
            Turn("human", f"{tag}first?"),
            Turn("assistant", " one "),
            Turn("human", f"{PLACEHOLDER if index == 1 else ''}second?"),
            Turn("assistant", "two"),
        )
        pictures = tuple(Noise(10 * index + k) for k in range((1, 2, 0)[index]))
        return Sample(f"s{index}", turns, pictures, "en")


def test_every_answer_is_asked_for_with_what_was_said_and_shown_before() -> None:
    questions = source_questions(Talk(), 100)
    assert [q.sample.id for q in questions] == ["s0/1", "s0/3", "s1/1", "s1/3"]
    assert [len(q.sample.turns) for q in questions] == [1, 3, 1, 3]
    assert [len(q.sample.pictures) for q in questions] == [1, 1, 1, 2]
    assert questions[0].answer == "one"
    assert len(source_questions(Talk(), 3)) == 3


def test_the_controls_change_the_pictures_and_nothing_else() -> None:
    questions = source_questions(Talk(), 100)
    for control in (shuffled(questions), blanked(questions, (0.5, 0.5, 0.5))):
        for before, after in zip(questions, control, strict=True):
            assert before.sample.turns == after.sample.turns and before.answer == after.answer
            pairs = zip(before.sample.pictures, after.sample.pictures, strict=True)
            assert all(one != other for one, other in pairs)
    colours = blanked(questions, (0.5, 0.5, 0.5))[0].sample.pictures[0].open().getcolors()
    assert colours == [(28 * 28, (127, 127, 127))]


def test_accuracy_is_the_share_of_answers_that_are_right_word_for_word() -> None:
    questions = source_questions(Talk(), 100)
    answers = ["one", "two", "One", "two"]
    assert accuracy(questions, answers) == 0.75
    assert accuracy_by(questions, answers, lambda q: q.language) == {"en": 0.75}
    by_question = accuracy_by(questions, answers, lambda q: q.answer)
    assert by_question == {"one": 0.5, "two": 1.0}


def test_the_held_out_sets_are_large_enough() -> None:
    new, unseen = scene_questions("new"), scene_questions("unseen")
    assert len(new) >= 1000 and len(unseen) >= 500
    for kind in {q.type for q in new}:
        assert sum(q.type == kind for q in new) >= 150
    assert {q.language for q in new} == {"en", "zh"}
