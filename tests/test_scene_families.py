"""The families of rendered pictures: answers follow from what is painted, and cannot be guessed."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from vlbench.data.sample import IMAGE_PLACEHOLDER
from vlbench.data.scene_albums import MAX_PICTURES, MIN_PICTURES, PICTURE_NAMES
from vlbench.data.scene_dataset import SceneCaptions, SceneConversations
from vlbench.data.scene_exam import held_out_questions
from vlbench.data.scene_families import (
    FAMILIES,
    FAMILY_WEIGHTS,
    family_of,
    list_picture_questions,
    make_pictures,
    picture_caption,
)
from vlbench.data.scene_lattice import LATTICE, MAX_OBJECTS, MIN_OBJECTS, make_lattice_scene
from vlbench.data.scene_lattice_text import DOT_QUESTIONS, list_lattice_questions
from vlbench.data.scene_letters import MIN_LETTERS, make_letter_scene
from vlbench.data.scene_painting import LETTERS
from vlbench.data.scene_text import LANGUAGES, list_questions
from vlbench.data.scene_world import COLOURS, IMAGE_SIDE, MAX_LETTERS, UNSEEN_PAIRS, RenderedScene

PICTURES = 150


def pictures(family: str, count: int = PICTURES) -> list[tuple[RenderedScene, ...]]:
    return [make_pictures(family, "test", 3, i, has_dot=family == "fine") for i in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_depends_on_its_stream_seed_and_index_alone(family: str) -> None:
    assert (
        pictures(family, 20)
        == [
            make_pictures(family, "test", 3, i, has_dot=family == "fine")
            for i in reversed(range(20))
        ][::-1]
    )
    assert len({one[0].open().tobytes() for one in pictures(family, 40)}) == 40
    assert make_pictures(family, "a", 0, 0) != make_pictures(family, "a", 1, 0)
    assert make_pictures(family, "a", 0, 0) != make_pictures(family, "b", 0, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_questions_are_of_the_family_and_have_one_answer(family: str) -> None:
    for some in pictures(family, 60):
        for language in LANGUAGES:
            asked = list_picture_questions(some, language)
            assert family in {family_of(q.type) for q in asked}
            assert len({q.text for q in asked}) == len(asked)


def test_lattice_scenes_are_crowded_and_name_something() -> None:
    counts = Counter[int]()
    for [scene] in pictures("crowd"):
        counts[len(scene.objects)] += 1
        assert all(UNSEEN_PAIRS[t.colour] != t.shape for t in scene.objects)
        asked = list_picture_questions((scene,), "en")
        kinds = {q.text.split()[1] for q in asked if q.type == "crowd"}
        assert kinds == {"colour", "shape"}
    assert min(counts) == MIN_OBJECTS and max(counts) == MAX_OBJECTS


@pytest.mark.parametrize(("family", "fewest_pixels"), [("place", 40), ("crowd", 20)])
def test_the_colour_of_every_object_of_a_lattice_is_where_it_should_be(
    family: str, fewest_pixels: int
) -> None:
    for [scene] in pictures(family, 40):
        image = np.asarray(scene.open()).astype(int)
        side = scene.extent / LATTICE
        by_cell = {t.cell: t for t in scene.objects}
        for cell in range(LATTICE**2):
            left, top = (
                round(scene.corner[k] + (cell % LATTICE, cell // LATTICE)[k] * side) for k in (0, 1)
            )
            tile = image[top : top + round(side), left : left + round(side)]
            near = {name: (abs(tile - c).max(-1) < 48).sum() for name, c in COLOURS.items()}
            if cell in by_cell:
                assert max(near, key=near.__getitem__) == by_cell[cell].colour, scene.name
                assert near[by_cell[cell].colour] >= fewest_pixels
            else:
                assert max(near.values()) == 0, scene.name


@pytest.mark.parametrize(
    ("family", "first", "last"), [("place", 0, 16), ("crowd", 16.3, 27.7)]
)  # pixels
def test_a_lattice_is_anywhere_in_the_image_and_rows_can_be_told_from_pixels(
    family: str, first: float, last: float
) -> None:
    rows, corners = dict[int, list[float]](), []
    for [scene] in pictures(family, 200):
        corners.append(scene.corner)
        for t in scene.objects:
            assert scene.cell_at(t.x, t.y) == t.cell
            assert all(t.radius <= at <= IMAGE_SIDE - t.radius for at in (t.x, t.y))
            rows.setdefault(t.cell // LATTICE, []).append(t.y)
    least, most = min(min(one) for one in corners), max(max(one) for one in corners)
    assert first <= least < first + 2 and last - 2 < most <= last
    assert all(max(rows[row]) < min(rows[row + 1]) for row in range(LATTICE - 1))


def test_what_is_beside_an_object_follows_from_positions() -> None:
    steps = {"to the left of": (-1, 0), "to the right of": (1, 0), "above": (0, -1)}
    steps["below"] = (0, 1)
    met = Counter[str]()
    for [scene] in pictures("place"):
        grid = {divmod(scene.cell_at(t.x, t.y), 4)[::-1]: t.colour_shape for t in scene.objects}
        for q in list_picture_questions((scene,), "en"):
            if q.type != "place":
                continue
            side, colour, shape = re.fullmatch(r"What is (.*) the (\w+) (\w+)\?", q.text).groups()
            [(x, y)] = [at for at, pair in grid.items() if pair == (colour, shape)]
            across, down = steps[side]
            there = x + across, y + down
            name = f"{there[1] + 1}{'abcd'[there[0]]} {' '.join(grid[there])}"
            assert q.answer == f"{name}."
            met[side] += 1
    assert min(met.values()) > 0.2 * max(met.values()) and len(met) == 4


def test_one_object_has_a_dot_that_is_painted() -> None:
    for index in range(60):
        dotted, plain = (make_lattice_scene("dots", 0, index, has_dot) for has_dot in (True, False))
        changed = (np.asarray(dotted.open()) != np.asarray(plain.open())).any(-1)
        [thing] = [t for t in dotted.objects if t.has_dot]
        rows, columns = np.nonzero(changed)
        assert 12 <= changed.sum() <= 36  # pixels
        assert abs(columns.mean() + 0.5 - thing.x) < 1 and abs(rows.mean() + 0.5 - thing.y) < 1
        [q] = [q for q in list_picture_questions((dotted,), "en") if q.type == "fine"]
        assert q.answer == f"The {thing.colour} {thing.shape}."
        assert not [q for q in list_picture_questions((plain,), "en") if q.type == "fine"]


def test_letters_are_read_from_left_to_right() -> None:
    lengths = Counter[int]()
    for [scene] in pictures("glyphs"):
        word = "".join(t.shape for t in sorted(scene.objects, key=lambda t: t.x))
        [q] = list_picture_questions((scene,), "en")
        assert q.answer == f'"{word}".' and len(set(word)) == len(word)
        assert {q.answer for q in list_picture_questions((scene,), "zh")} == {f'"{word}"。'}
        assert all(10 <= 2 * t.radius <= 14 for t in scene.objects)
        lengths[len(word)] += 1
    assert min(lengths) == MIN_LETTERS and max(lengths) == MAX_LETTERS


def test_every_letter_is_painted_in_its_own_way() -> None:
    """Averages over many places tell any two letters apart."""
    sums = {letter: np.zeros((14, 14)) for letter in LETTERS}
    for index in range(300):
        scene = make_letter_scene("ink", 0, index)
        ink = 255 - np.asarray(scene.open().convert("L")).astype(float)
        for t in scene.objects:
            top, left = round(t.y) - 7, round(t.x) - 7
            if 0 <= top <= IMAGE_SIDE - 14 and 0 <= left <= IMAGE_SIDE - 14:
                tile = ink[top : top + 14, left : left + 14]
                sums[t.shape] += (tile - tile.min()) / np.ptp(tile)
    shapes = [total.ravel() / np.linalg.norm(total) for total in sums.values()]
    alike = np.array(shapes) @ np.array(shapes).T
    assert (alike - np.eye(len(shapes))).max() < 0.95


def test_a_question_about_an_album_needs_the_right_picture() -> None:
    for album in pictures("many", 80):
        assert MIN_PICTURES <= len(album) <= MAX_PICTURES
        for q in list_picture_questions(album, "en"):
            text, name = re.fullmatch(r"(.*) in the (\w+ picture)\?", q.text).groups()
            found = [
                {one.text: one.answer for one in list_questions(scene, "en")}.get(f"{text}?")
                for scene in album
            ]
            assert found[PICTURE_NAMES["en"].index(name)] == q.answer
            assert any(answer not in (None, q.answer) for answer in found)


def test_samples_show_each_image_of_an_album_after_its_name() -> None:
    source = SceneConversations(0, 300, 4)
    albums = [source[index] for index in range(300) if len(source[index].images) > 1]
    assert {sample.language for sample in albums} == set(LANGUAGES)
    for sample in albums:
        names = PICTURE_NAMES[sample.language]
        lines = sample.turns[0].text.split("\n")
        assert len(lines) == len(sample.images) + 1
        for name, line in zip(names, lines[:-1], strict=False):
            assert name in line and line.endswith(IMAGE_PLACEHOLDER)
        assert sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in sample.turns) == len(lines) - 1


def test_training_shows_every_family_where_it_can_be_seen() -> None:
    source = SceneConversations(0, 1000, 10)
    firsts = [(len(source[i].images) > 1, source[i].images[0]) for i in range(1000)]
    grids = Counter((is_album, one.grid, one.extent) for is_album, one in firsts)
    assert len(grids) == len(FAMILY_WEIGHTS)
    assert min(grids.values()) >= 70
    assert {SceneCaptions(0, 100)[i].images[0].grid for i in range(100)} == {2, 4, 8}
    for small in (SceneCaptions(0, 100, 56), SceneConversations(0, 100, 4, 56)):
        assert {small[i].images[0].grid for i in range(100)} == {2}


def test_objects_that_stand_apart_leave_a_question() -> None:
    index = 2475  # of seed 0: nothing is beside anything, and no object has a dot
    assert not list_lattice_questions(make_lattice_scene("conversations", 0, index), "en")
    sample = SceneConversations(0, index + 1, 10)[index]
    assert [turn.role for turn in sample.turns] == ["human", "assistant"]
    assert sample.turns[0].text.endswith(tuple(DOT_QUESTIONS.values()))
    assert any(one.has_dot for one in sample.images[0].objects)


def test_a_caption_names_every_object_at_its_place() -> None:
    for [scene] in pictures("fine", 40):
        said = picture_caption(scene, "en")
        for t in scene.objects:
            place = "1234"[t.cell // LATTICE] + "abcd"[t.cell % LATTICE]
            assert f"{place} {t.colour} {t.shape}" in said
            assert (f"dot {place}" in said) == t.has_dot
    for [scene] in pictures("glyphs", 10):
        assert "".join(t.shape for t in scene.objects) in picture_caption(scene, "zh")


def test_the_exam_asks_each_question_of_one_picture_of_its_family() -> None:
    for q in held_out_questions("new"):
        assert q.family in FAMILIES
        [same] = [o for o in list_picture_questions(q.images, q.language) if o.text == q.text]
        assert same.answer == q.answer
        assert (len(q.images) > 1) == (q.family == "many")
        assert any(t.has_dot for t in q.images[0].objects) == (q.family == "fine")
