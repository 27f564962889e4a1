"""Rendered scenes: pure functions, balanced answers, unseen pairs, images that fit the texts.

This is about the family gist and the sources; `test_scene_families` is about the other families.
"""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
import pytest

from vlbench.data.sample import IMAGE_PLACEHOLDER, Sample
from vlbench.data.scene_dataset import SceneCaptions, SceneConversations
from vlbench.data.scene_exam import (
    QUESTIONS_PER_FAMILY,
    HeldOutSceneQuestion,
    held_out_questions,
)
from vlbench.data.scene_families import FAMILIES, list_picture_questions
from vlbench.data.scene_text import (
    LANGUAGES,
    QUESTION_TYPES,
    SceneQuestion,
    list_questions,
    scene_caption,
)
from vlbench.data.scene_world import (
    COLOURS,
    IMAGE_SIDE,
    QUARTERS,
    SHAPES,
    UNSEEN_PAIRS,
    RenderedScene,
    make_scene,
)

IMAGES = 200


def scenes(unseen: bool = False) -> list[RenderedScene]:
    return [make_scene("test", 3, index, unseen) for index in range(IMAGES)]


def test_a_scene_depends_on_its_stream_seed_and_index_alone() -> None:
    backwards = [make_scene("test", 3, index) for index in reversed(range(IMAGES))]
    random.seed(1)
    assert scenes() == backwards[::-1]
    assert make_scene("test", 3, 0) != make_scene("test", 4, 0) != make_scene("other", 4, 0)
    one = scenes()[0]
    assert pickle.loads(pickle.dumps(one)) == one
    assert one.open().tobytes() == one.open().tobytes()
    assert (one.open().size, one.open().mode) == ((IMAGE_SIDE, IMAGE_SIDE), "RGB")


def test_images_differ() -> None:
    assert len({one.open().tobytes() for one in scenes()}) == IMAGES


def test_the_unseen_pairs_are_one_per_colour_and_shape() -> None:
    assert set(UNSEEN_PAIRS) == set(COLOURS)
    assert sorted(UNSEEN_PAIRS.values()) == sorted(SHAPES)
    assert UNSEEN_PAIRS["green"] == "star"


def test_training_never_shows_or_names_an_unseen_pair() -> None:
    for source in (SceneCaptions(0, 400), SceneConversations(0, 400, 4)):
        for index in range(len(source)):
            for scene in source[index].images:
                assert all(UNSEEN_PAIRS[t.colour] != t.shape for t in scene.objects)
            text = " ".join(turn.text for turn in source[index].turns)
            assert "green star" not in text and "绿色的星形" not in text
    for question in held_out_questions("new"):
        for scene in question.images:
            assert all(UNSEEN_PAIRS[t.colour] != t.shape for t in scene.objects)


def test_unseen_questions_are_about_an_unseen_pair() -> None:
    met = Counter()
    for question in held_out_questions("unseen"):
        pairs = [
            t.colour_shape for t in question.images[0].objects if UNSEEN_PAIRS[t.colour] == t.shape
        ]
        assert len(pairs) == 1
        met[pairs[0]] += 1
        asked = list_questions(question.images[0], question.language)
        [one] = [q for q in asked if q.text == question.text]
        assert one.answer == question.answer
        assert pairs[0] in one.relevant_pairs
    assert len(met) == 6 and min(met.values()) >= 40


@pytest.mark.parametrize(("kind", "size"), [("new", 6 * QUESTIONS_PER_FAMILY), ("unseen", 600)])
def test_held_out_sets_are_large_and_even(kind: str, size: int) -> None:
    asked = held_out_questions(kind)
    assert len(asked) == size
    assert len({q.id for q in asked}) == len({q.images[0].name for q in asked}) == size
    gist = [q for q in asked if q.family == "gist"]
    for kinds in (Counter(q.type for q in gist), Counter(q.type for q in gist[:100])):
        assert set(kinds) == set(QUESTION_TYPES) and max(kinds.values()) == min(kinds.values())
    families = FAMILIES if kind == "new" else ("gist",)
    for some in (asked, asked[: size // 5]):
        counts = Counter((q.family, q.language) for q in some)
        assert len(counts) == 2 * len(families)
        assert max(counts.values()) - min(counts.values()) <= 10


def test_held_out_images_are_not_in_training() -> None:
    training = SceneConversations(0, 2000, 1)
    known = {scene.objects for index in range(2000) for scene in training[index].images}
    assert not known & {scene.objects for q in held_out_questions("new") for scene in q.images}


@pytest.mark.parametrize("kind", ["new", "unseen"])
@pytest.mark.parametrize("by", ["type", "question"])
def test_a_guesser_without_images_fails(kind: str, by: str) -> None:
    """The most frequent training answer per type, or per question, is seldom right."""

    def key(kind: str, language: str, text: str) -> tuple[str, ...]:
        return (kind, language) if by == "type" else (kind, language, text)

    counts: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for sample, q in training_questions(3000):
        counts[key(q.type, sample.language, q.text)][q.answer] += 1
    right, asked = Counter[str](), Counter[str]()
    for question in held_out_questions(kind):
        seen = counts.get(key(question.type, question.language, question.text))
        asked[question.type] += 1
        right[question.type] += bool(seen) and seen.most_common(1)[0][0] == question.answer
    assert all(right[kind] / asked[kind] <= 0.36 for kind in asked), (right, asked)


def training_questions(sample_count: int) -> Iterator[tuple[Sample, SceneQuestion]]:
    """Give the questions of training samples with what they were made from."""
    source = SceneConversations(0, sample_count, 4)
    for index in range(sample_count):
        sample = source[index]
        asked = {q.text: q for q in list_picture_questions(sample.images, sample.language)}
        for human, assistant in zip(sample.turns[::2], sample.turns[1::2], strict=True):
            q = asked[human.text.rpartition("\n")[2]]
            assert q.answer == assistant.text
            yield sample, q


def test_answers_given_while_training_are_even() -> None:
    answers: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for sample, q in training_questions(2000):
        answers[q.type, sample.language][q.answer] += 1
    assert {kind for kind, _ in answers} == {*QUESTION_TYPES, *FAMILIES[1:]}
    for found in answers.values():
        assert found.most_common(1)[0][1] / found.total() < 0.42


def test_paint_agrees_with_words() -> None:
    """An object's colour is at its position, and empty quarters have none."""
    for one in scenes() + scenes(unseen=True):
        image = np.asarray(one.open()).astype(int)
        for cell in range(4):
            left, top = cell % 2 * IMAGE_SIDE // 2, cell // 2 * IMAGE_SIDE // 2
            quarter = image[top : top + IMAGE_SIDE // 2, left : left + IMAGE_SIDE // 2]
            near = {
                name: (abs(quarter - colour).max(-1) < 48).sum() for name, colour in COLOURS.items()
            }
            here = [t for t in one.objects if t.cell == cell]
            assert len(here) <= 1
            if here:
                assert max(near, key=near.__getitem__) == here[0].colour, (one.name, near)
            else:
                assert max(near.values()) == 0, (one.name, near)


def test_answers_follow_from_the_scene() -> None:
    """Answer some questions independently of the code that made them."""
    cells = {(0, 0): "top left", (0, 1): "top right", (1, 0): "bottom left", (1, 1): "bottom right"}
    for one in scenes():
        for q in list_questions(one, "en"):
            words = q.text.rstrip("?").split()
            if q.type == "position":
                [t] = [t for t in one.objects if all(w in t.colour_shape for w in words[3:])]
                assert q.answer == f"At the {cells[int(t.y > 56), int(t.x > 56)]}."
            if q.type == "relation":
                a, b = q.text[13:].rstrip("?").split(" relative to the ")
                [p] = [t for t in one.objects if f"{t.colour} {t.shape}" == a]
                [r] = [t for t in one.objects if f"{t.colour} {t.shape}" == b]
                far_x, far_y = p.x - r.x, p.y - r.y
                same_row = (p.y > 56) == (r.y > 56)
                across = "To the left." if far_x < 0 else "To the right."
                assert q.answer == (across if same_row else "Above." if far_y < 0 else "Below.")


def test_captions_name_every_object() -> None:
    for one in scenes():
        said = scene_caption(one, "en")
        assert all(f"{t.colour} {t.shape}" in said for t in one.objects)
        assert said.startswith(("One", "Two", "Three", "Four")[len(one.objects) - 1])


def test_samples_have_the_form_that_sources_promise() -> None:
    source = SceneConversations(5, 100, 4)
    sample = next(source[index] for index in range(100) if source[index].images[0].grid == QUARTERS)
    assert sample.turns[0].text.startswith(f"{IMAGE_PLACEHOLDER}\n")
    assert sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in sample.turns) == 1
    assert [turn.role for turn in sample.turns] == ["human", "assistant"] * 4
    assert len({turn.text for turn in sample.turns[::2]}) == 4
    assert [SceneConversations(5, 100, 4)[9]] == [source[9]]
    assert {SceneCaptions(0, 50)[index].language for index in range(50)} == set(LANGUAGES)
    one = held_out_questions("new")[0]
    assert isinstance(one, HeldOutSceneQuestion) and one.to_sample().turns[1].text == one.answer
    for source in (SceneCaptions(0, 3), SceneConversations(0, 3, 1)):
        with pytest.raises(IndexError):
            source[3]


def test_scenes_need_no_torch() -> None:
    modules = "vlbench.data.scene_exam, vlbench.data.scene_dataset"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
