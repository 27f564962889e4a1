"""The rendered world: pure, balanced, honest about what is unseen, and painted as it says."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest

from vlbench.data.sample import PLACEHOLDER
from vlbench.data.scene_text import LANGUAGES, TYPES, caption, pick, questions
from vlbench.data.scene_world import COLOURS, SHAPES, SIDE, UNSEEN, Scene, scene
from vlbench.data.scenes import Captions, Conversations, Question, held_out

PICTURES = 200


def pictures(unseen: bool = False) -> list[Scene]:
    return [scene("test", 3, index, unseen) for index in range(PICTURES)]


def test_a_scene_depends_on_its_stream_seed_and_index_alone() -> None:
    backwards = [scene("test", 3, index) for index in reversed(range(PICTURES))]
    random.seed(1)
    assert pictures() == backwards[::-1]
    assert scene("test", 3, 0) != scene("test", 4, 0) != scene("other", 4, 0)
    one = pictures()[0]
    assert pickle.loads(pickle.dumps(one)) == one
    assert one.open().tobytes() == one.open().tobytes()
    assert (one.open().size, one.open().mode) == ((SIDE, SIDE), "RGB")


def test_pictures_differ() -> None:
    assert len({one.open().tobytes() for one in pictures()}) == PICTURES


def test_the_unseen_pairs_are_one_per_colour_and_shape() -> None:
    assert set(UNSEEN) == set(COLOURS)
    assert sorted(UNSEEN.values()) == sorted(SHAPES)
    assert UNSEEN["green"] == "star"


def test_training_never_shows_or_names_an_unseen_pair() -> None:
    for source in (Captions(0, 400), Conversations(0, 400, 4)):
        for index in range(len(source)):
            for picture in source[index].pictures:
                assert all(UNSEEN[t.colour] != t.shape for t in picture.things)
            text = " ".join(turn.text for turn in source[index].turns)
            assert "green star" not in text and "绿色的星形" not in text
    for question in held_out("new"):
        assert all(UNSEEN[t.colour] != t.shape for t in question.picture.things)


def test_unseen_questions_are_about_an_unseen_pair() -> None:
    met = Counter()
    for question in held_out("unseen"):
        pairs = [t.pair for t in question.picture.things if UNSEEN[t.colour] == t.shape]
        assert len(pairs) == 1
        met[pairs[0]] += 1
        asked = questions(question.picture, question.language)
        [one] = [q for q in asked if q.text == question.text]
        assert one.answer == question.answer
        assert pairs[0] in one.about
    assert len(met) == 6 and min(met.values()) >= 40


@pytest.mark.parametrize(("kind", "least", "each"), [("new", 1000, 150), ("unseen", 500, 100)])
def test_held_out_sets_are_large_and_even(kind: str, least: int, each: int) -> None:
    asked = held_out(kind)
    assert len(asked) >= least
    assert len({q.id for q in asked}) == len({q.picture.name for q in asked}) == len(asked)
    for kinds in (Counter(q.type for q in asked), Counter(q.type for q in asked[:100])):
        assert set(kinds) == set(TYPES) and max(kinds.values()) == min(kinds.values())
    assert Counter(q.type for q in asked)["count"] >= each
    languages = Counter(q.language for q in asked)
    assert languages["en"] == languages["zh"]


def test_held_out_pictures_are_not_in_training() -> None:
    known = {Conversations(0, 2000, 1)[i].pictures[0].things for i in range(2000)}
    assert not known & {q.picture.things for q in held_out("new")}


@pytest.mark.parametrize("kind", ["new", "unseen"])
@pytest.mark.parametrize("by", ["type", "question"])
def test_a_guesser_without_pictures_fails(kind: str, by: str) -> None:
    """The most frequent training answer per type, or per question, is seldom right."""

    def key(kind: str, language: str, text: str) -> tuple[str, ...]:
        return (kind, language) if by == "type" else (kind, language, text)

    rng = random.Random(0)
    counts: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for index in range(3000):
        language = LANGUAGES[index % 2]
        for q in pick(rng, questions(scene("guesser", 0, index), language), 4):
            counts[key(q.type, q.language, q.text)][q.answer] += 1
    right, asked = Counter[str](), Counter[str]()
    for q in held_out(kind):
        seen = counts.get(key(q.type, q.language, q.text))
        asked[q.type] += 1
        right[q.type] += bool(seen) and seen.most_common(1)[0][0] == q.answer
    assert all(right[kind] / asked[kind] <= 0.36 for kind in TYPES), (right, asked)


def test_answers_given_while_training_are_even() -> None:
    answers: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for index in range(1500):
        sample = Conversations(0, 1500, 4)[index]
        asked = {q.text: q for q in questions(sample.pictures[0], sample.language)}
        for human, assistant in zip(sample.turns[::2], sample.turns[1::2], strict=True):
            q = asked[human.text.removeprefix(f"{PLACEHOLDER}\n")]
            assert q.answer == assistant.text
            answers[q.type, q.language][q.answer] += 1
    assert len(answers) == 10
    for found in answers.values():
        assert found.most_common(1)[0][1] / found.total() < 0.42


def test_paint_agrees_with_words() -> None:
    """Read the colour at the place that the scene names, and nothing of it in empty quarters."""
    for one in pictures() + pictures(unseen=True):
        image = np.asarray(one.open()).astype(int)
        for cell in range(4):
            left, top = cell % 2 * SIDE // 2, cell // 2 * SIDE // 2
            quarter = image[top : top + SIDE // 2, left : left + SIDE // 2]
            near = {
                name: (abs(quarter - colour).max(-1) < 48).sum() for name, colour in COLOURS.items()
            }
            here = [t for t in one.things if t.cell == cell]
            assert len(here) <= 1
            if here:
                assert max(near, key=near.__getitem__) == here[0].colour, (one.name, near)
            else:
                assert max(near.values()) == 0, (one.name, near)


def test_answers_follow_from_the_scene() -> None:
    """Answer some questions by another way than the one that made them."""
    cells = {(0, 0): "top left", (0, 1): "top right", (1, 0): "bottom left", (1, 1): "bottom right"}
    for one in pictures():
        for q in questions(one, "en"):
            words = q.text.rstrip("?").split()
            if q.type == "position":
                [t] = [t for t in one.things if all(w in t.pair for w in words[3:])]
                assert q.answer == f"At the {cells[int(t.y > 56), int(t.x > 56)]}."
            if q.type == "relation":
                a, b = q.text[13:].rstrip("?").split(" relative to the ")
                [p] = [t for t in one.things if f"{t.colour} {t.shape}" == a]
                [r] = [t for t in one.things if f"{t.colour} {t.shape}" == b]
                far_x, far_y = p.x - r.x, p.y - r.y
                same_row = (p.y > 56) == (r.y > 56)
                across = "To the left." if far_x < 0 else "To the right."
                assert q.answer == (across if same_row else "Above." if far_y < 0 else "Below.")


def test_captions_name_every_object() -> None:
    for one in pictures():
        said = caption(one, "en")
        assert all(f"{t.colour} {t.shape}" in said for t in one.things)
        assert said.startswith(("One", "Two", "Three", "Four")[len(one.things) - 1])


def test_samples_have_the_form_that_sources_promise() -> None:
    sample = Conversations(5, 10, 4)[9]
    assert sample.turns[0].text.startswith(f"{PLACEHOLDER}\n")
    assert sum(turn.text.count(PLACEHOLDER) for turn in sample.turns) == 1
    assert [turn.role for turn in sample.turns] == ["human", "assistant"] * 4
    assert len({turn.text for turn in sample.turns[::2]}) == 4
    assert Conversations(5, 10, 4)[9] == sample
    assert {Captions(0, 50)[index].language for index in range(50)} == set(LANGUAGES)
    one = held_out("new")[0]
    assert isinstance(one, Question) and one.sample().turns[1].text == one.answer
    for source in (Captions(0, 3), Conversations(0, 3, 1)):
        with pytest.raises(IndexError):
            source[3]


def test_the_world_needs_no_torch() -> None:
    code = "import sys, vlbench.data.scenes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
