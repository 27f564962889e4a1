"""Large scenes: answers follow from what is painted, and a recipe trains and asks about them."""

from __future__ import annotations

import numpy as np
import pytest

from vlbench.config.recipe import load_recipe
from vlbench.data.data_sources import open_held_out, open_stage_sources
from vlbench.data.large_scene_dataset import LargeSceneCaptions, LargeSceneConversations
from vlbench.data.large_scene_exam import large_held_out_questions
from vlbench.data.large_scenes import (
    HEIGHT_BANDS,
    LARGE_FAMILIES,
    LARGE_SIDE,
    large_caption,
    list_large_questions,
    make_large_scene,
    question_type,
)
from vlbench.data.scene_families import list_picture_questions, make_pictures
from vlbench.data.scene_text import LANGUAGES
from vlbench.data.scene_world import COLOURS, UNSEEN_PAIRS
from vlbench.errors import UserError
from vlbench.evaluate.heldout_questions import final_questions
from vlbench.evaluate.question_count import count_final_questions


@pytest.mark.parametrize("family", LARGE_FAMILIES)
@pytest.mark.parametrize(("side", "first"), [(LARGE_SIDE, 0), (336, 5)])
def test_a_scene_shows_what_it_says_at_any_side(family: str, side: int, first: int) -> None:
    for index in range(first, first + 5):
        scene = make_large_scene(family, "test", 3, index, side)
        image = np.asarray(scene.open()).astype(int)
        assert image.shape == (side, side, 3)
        low, high = HEIGHT_BANDS[index % len(HEIGHT_BANDS)]
        assert question_type(scene) == f"{family} {low}-{high} px"
        painted = np.zeros((side, side), bool)
        for thing in scene.objects:
            assert low <= 2 * thing.radius <= high and UNSEEN_PAIRS[thing.colour] != thing.shape
            assert scene.cell_at(thing.x, thing.y) == thing.cell
            far = np.abs(image - np.array(COLOURS[thing.colour])).max(-1)
            rows, columns = np.nonzero(far < 80)
            near = (abs(rows - thing.y) < high) & (abs(columns - thing.x) < high)
            assert near.any()
            top, left = int(thing.y - high), int(thing.x - high)
            painted[max(top, 0) : top + 2 * high, max(left, 0) : left + 2 * high] = True
        ground = image[~painted].reshape(-1, 3)
        assert (ground.max(0) - ground.min(0)).max() < 40  # nothing else is painted


def test_a_scene_depends_on_its_arguments_alone() -> None:
    assert make_large_scene("letters", "a", 0, 5) == make_large_scene("letters", "a", 0, 5)
    others = {
        make_large_scene(family, stream, seed, index, side)
        for family in LARGE_FAMILIES
        for stream in ("a", "b")
        for seed in (0, 1)
        for index in (0, 5)
        for side in (224, 336)
    }
    assert len(others) == 32


def test_words_are_those_of_the_other_scenes() -> None:
    """The language miniature has read these alone."""
    known = {
        question.text
        for family in ("gist", "glyphs")
        for index in range(200)
        for language in LANGUAGES
        for question in list_picture_questions(make_pictures(family, "t", 0, index), language)
    }
    asked = large_held_out_questions()
    assert {question.text for question in asked} <= known
    for question in asked[:80]:
        [scene] = question.images
        answers = {q.text: q.answer for q in list_large_questions(scene, question.language)}
        assert answers[question.text] == question.answer
        if question.type.startswith("letters"):
            word = "".join(thing.shape for thing in scene.objects)
            assert word in question.answer and word in large_caption(scene, "en")


def test_the_exam_is_balanced_and_of_pictures_that_training_never_draws() -> None:
    asked = large_held_out_questions()
    kinds = len(LARGE_FAMILIES) * len(HEIGHT_BANDS)
    for prefix in (kinds, 5 * kinds, len(asked)):
        types = [question.type for question in asked[:prefix]]
        assert {types.count(one) for one in types} == {prefix // kinds}
    languages = [question.language for question in asked]
    assert languages.count("en") == languages.count("zh") == len(asked) // 2
    assert len({question.id for question in asked}) == len(asked) == 1000
    trained = LargeSceneConversations(0, 300, 10)
    words = {trained[index].images[0].objects for index in range(300)}
    assert not words & {question.images[0].objects for question in asked}


@pytest.mark.parametrize(
    "make", [LargeSceneCaptions, lambda s, n: LargeSceneConversations(s, n, 9)]
)
def test_sources_speak_both_languages_and_end(make) -> None:
    source = make(0, 60)
    samples = [source[index] for index in range(60)]
    assert samples == [source[index] for index in range(60)]
    assert {sample.language for sample in samples} == set(LANGUAGES)
    assert len({sample.id for sample in samples}) == len(source) == 60
    with pytest.raises(IndexError):
        source[60]


def test_a_conversation_asks_about_an_object_once() -> None:
    source = LargeSceneConversations(0, 200, 10)
    for sample in (source[index] for index in range(200)):
        asked = [turn.text for turn in sample.turns if turn.role == "human"]
        objects = sample.images[0].objects
        assert len(asked) in (1, len(objects))
        told = " ".join(turn.text for turn in sample.turns)
        if len(asked) > 1 and sample.language == "en":
            assert all(told.lower().count(thing.shape) == 1 for thing in objects)


def test_a_recipe_trains_on_large_scenes_and_is_asked_about_them() -> None:
    words = ["recipe=yivl_llava", "data.train=large_scenes", "data.scene_side=336"]
    data = load_recipe(words).last_stage_data
    [(source, _)] = open_stage_sources(data)
    held_out = open_held_out(data)
    assert source.name == held_out.name == "large scene conversations"
    assert source[0].images[0].side == held_out[0].images[0].side == 336
    assert source[0].images != held_out[0].images
    about, asked, unseen = final_questions(data, 16)
    assert (about, len(asked), unseen) == ("new images", 16, [])
    assert count_final_questions(data, None) == (1000, 1000)
    assert len({question.family for question in asked}) > 5
    for alignment in ("align_224", "align_448"):
        [(captions, _)] = open_stage_sources(load_recipe(words).stage_data(alignment))
        assert captions.name == "large scene captions"


def test_a_mixture_may_have_large_scenes() -> None:
    recipe = load_recipe(["recipe=yivl_llava", "data.mix=[{train: large_scenes}, {train: scenes}]"])
    sources = open_stage_sources(recipe.last_stage_data)
    assert [source.name for source, _ in sources] == [
        "large scene conversations",
        "scene conversations",
    ]


def test_a_side_below_the_square_is_refused() -> None:
    with pytest.raises(UserError, match="scene_side"):
        load_recipe(["recipe=yivl_llava", "data.scene_side=64"])
