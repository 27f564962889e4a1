"""Text about rendered scenes, without images: the training data of the miniature language model.

A description of a scene, in either language, stands where an image would; facts, a caption or a
chat about it follow. Half of the descriptions are rasters: the scene cell by cell, with all words
of a cell at one position (their embeddings are added). So the model learns from text that one
position can hold several words, as a visual token must, and `fit` has to teach only which features
mean which words. No unseen pair occurs.
"""

from __future__ import annotations

import random
from collections import Counter

from vlbench.data.chat_template import YI_VL
from vlbench.data.sample import ChatTurn
from vlbench.data.scene_dataset import CAPTION_PROMPTS
from vlbench.data.scene_text import (
    CELL_NAMES,
    CHINESE_WORDS,
    LANGUAGES,
    NUMBER_WORDS,
    draw_question,
    group_by_type,
    list_questions,
    object_name,
    pick_questions,
    scene_caption,
)
from vlbench.data.scene_world import IMAGE_SIDE, RenderedScene, SceneObject, make_scene

TEXT_SCENE_STREAM = "words"  # stream of scenes; the images of fit come from others
TextPiece = tuple[str, bool]  # text, and whether it is supervised
_FACTS_PER_DOCUMENT, _QUESTIONS_PER_DRILL, _QUESTIONS_PER_CHAT = 14, 10, 8  # in one document
_OTHER_LANGUAGE_SHARE = 0.2  # share of phrases in the language that the rest is not told in
DESCRIPTION_FORMS = {"raster": 6, "phrases": 4, "list": 1, "sentences": 1}  # how often each
# a cell of a raster begins or ends; the next word is written over the last
CELL_SEPARATOR, OVERLAY_SEPARATOR = "\t", "\b"
_RASTER_GRIDS = (4, 4, 8)  # cells along a side: the patches at 56 pixels (more often) and at 112
_COVERED_RADII = 0.7  # a cell shows an object that is at most so many radii away


def make_document(seed: int, index: int) -> list[TextPiece]:
    """Make document `index`: a scene in words and its caption, or a chat about it."""
    rng = random.Random(f"document/{seed}/{index}")
    told = make_scene(TEXT_SCENE_STREAM, seed, index)
    if rng.random() < 0.25:
        text = describe_in_words(rng, told) if rng.random() < 0.9 else ""
        return [(text, False), (scene_caption(told, rng.choice(LANGUAGES)) + "\n", True)]
    return make_chat(rng, told)


def make_facts(seed: int, index: int) -> list[TextPiece]:
    """Make a scene in words and a dozen short facts, each of which restates a part of it.

    A fact ("the star is red.") is almost all answer, so that binding (this colour with that shape)
    is learned before there are questions.
    """
    rng = random.Random(f"facts/{seed}/{index}")
    told = make_scene(TEXT_SCENE_STREAM, seed, index)
    known = _list_facts(told, rng.choice(LANGUAGES))
    pieces: list[TextPiece] = [(f"{describe_in_words(rng, told)}\n", False)]
    for about, what, end in rng.choices(known, k=_FACTS_PER_DOCUMENT):
        pieces += [(about, False), (what, True), (end, False)]
    return pieces


def _list_facts(described_scene: RenderedScene, language: str) -> list[tuple[str, str, str]]:
    """List what can be said of the objects without doubt: (about what, what, full stop)."""
    zh = language == "zh"
    colours = Counter(thing.colour for thing in described_scene.objects)
    shapes = Counter(thing.shape for thing in described_scene.objects)
    pairs = Counter(thing.colour_shape for thing in described_scene.objects)
    verbs = {"is": "是", "at": "在", "are": "有"}
    known = []
    for thing in described_scene.objects:
        colour, shape = (
            _translate_word(thing.colour, language),
            _translate_word(thing.shape, language),
        )
        name, where = object_name(thing, language), CELL_NAMES[language][thing.cell]
        known.append((where, "is", name))
        if shapes[thing.shape] == 1:
            known += [(shape, "is", colour), (shape, "at", where)]
        if colours[thing.colour] == 1:
            known += [(colour, "is", shape), (colour, "at", where)]
        if pairs[thing.colour_shape] == 1:
            known.append((name, "at", where))
    for name, number in [*colours.items(), *shapes.items()]:
        many = NUMBER_WORDS[language][number - 1]
        known += [(_translate_word(name, language), "are", many)] * (1 if number == 1 else 2)
    return [
        (f"{about}{verbs[verb]}", what, "。") if zh else (f" the {about} {verb}", f" {what}", ".")
        for about, verb, what in known
    ]


def _translate_word(name: str, language: str) -> str:
    return CHINESE_WORDS[name] if language == "zh" else name


def make_drill(seed: int, index: int, count_weight: int = 1) -> list[TextPiece]:
    """Make a scene in words and questions about it, each followed by its answer and no more.

    `counts` says how much more often counts are asked than anything else.
    """
    rng = random.Random(f"drill/{seed}/{index}")
    told = make_scene(TEXT_SCENE_STREAM, seed, index)
    asked = group_by_type(list_questions(told, rng.choice(LANGUAGES)))
    kinds = [*asked] + ["count"] * (count_weight - 1)
    pieces: list[TextPiece] = [(f"{describe_in_words(rng, told)}\n", False)]
    for _ in range(_QUESTIONS_PER_DRILL):
        one = draw_question(rng, asked[rng.choice(kinds)])
        pieces += [(one.text, False), (f" {one.answer}", True), ("\n", False)]
    return pieces


def make_chat(rng: random.Random, described_scene: RenderedScene) -> list[TextPiece]:
    """Make a conversation in Yi's template in which words stand for the image."""
    language = rng.choice(LANGUAGES)
    turns: list[ChatTurn] = []
    if rng.random() < 0.1:
        turns += _question_turns(
            CAPTION_PROMPTS[language], scene_caption(described_scene, language)
        )
    for asked in pick_questions(
        rng, list_questions(described_scene, language), _QUESTIONS_PER_CHAT
    ):
        turns += _question_turns(asked.text, asked.answer)
    if rng.random() < 0.97:
        turns[0] = ChatTurn("human", f"{describe_in_words(rng, described_scene)}\n{turns[0].text}")
    return YI_VL.render_pieces(turns)


def _question_turns(question: str, answer: str) -> list[ChatTurn]:
    return [ChatTurn("human", question), ChatTurn("assistant", answer)]


def describe_in_words(rng: random.Random, described_scene: RenderedScene) -> str:
    """Tell a scene in one of the forms; all but a raster tell the objects in random order.

    They may tell an object several times, with full stops in between: so it is with the patches of
    an image, of which many show the same object, and many show none.
    """
    form = rng.choices(list(DESCRIPTION_FORMS), list(DESCRIPTION_FORMS.values()))[0]
    home = rng.choice(LANGUAGES)
    if form == "raster":
        return describe_raster(described_scene, home, rng.choice(_RASTER_GRIDS))
    away = LANGUAGES[1 - LANGUAGES.index(home)]
    parts = [
        _describe_object(thing, away if rng.random() < _OTHER_LANGUAGE_SHARE else home, form)
        for thing in described_scene.objects
        for _ in range(rng.choice((1, 1, 2, 2, 3)))
    ]
    parts += [" ."] * rng.choice((0, 2, 4, 8))
    rng.shuffle(parts)
    return "".join(parts).strip()


def describe_raster(described_scene: RenderedScene, language: str, grid_size: int) -> str:
    """Tell a scene as `grid` x `grid` cells row by row: words over one another, or a full stop."""
    cells = [" ."] * grid_size**2
    for thing in described_scene.objects:
        where = CELL_NAMES[language][thing.cell]
        words = [
            _translate_word(thing.colour, language),
            _translate_word(thing.shape, language),
            *where.split(),
        ]
        text = OVERLAY_SEPARATOR.join(words if language == "zh" else [f" {word}" for word in words])
        for cell in _covered_cells(thing, grid_size):
            cells[cell] = text
    return CELL_SEPARATOR + CELL_SEPARATOR.join(cells) + CELL_SEPARATOR


def _covered_cells(thing: SceneObject, grid_size: int) -> list[int]:
    """List the cells that show an object: those of its quarter that it touches, at least one."""
    pixels = IMAGE_SIDE / grid_size
    far = []
    for cell in range(grid_size**2):
        row, column = divmod(cell, grid_size)
        if 2 * row // grid_size * 2 + 2 * column // grid_size != thing.cell:
            continue
        across = max(abs((column + 0.5) * pixels - thing.x) - pixels / 2, 0)
        down = max(abs((row + 0.5) * pixels - thing.y) - pixels / 2, 0)
        far.append(((across**2 + down**2) ** 0.5, cell))
    far.sort()
    return [
        cell
        for rank, (away, cell) in enumerate(far)
        if not rank or away < _COVERED_RADII * thing.radius
    ]


def _describe_object(thing: SceneObject, language: str, form: str) -> str:
    where, what = CELL_NAMES[language][thing.cell], object_name(thing, language)
    if form == "phrases":
        return f"{what}{where}。" if language == "zh" else f" {what} {where}."
    if form == "list":
        return f"{where}：{what}\n" if language == "zh" else f" {where}: {what}\n"
    if language == "zh":
        return f"{where}有{NUMBER_WORDS['zh'][0]}{what}。"
    return f" There is a {what} at the {where}."
