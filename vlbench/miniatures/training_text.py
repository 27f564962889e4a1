"""Text about rendered pictures, without images: what the miniature language model learns from.

A description of one or several pictures (`told_pictures`) stands where images would; facts, a
caption or a chat about them follow. No unseen pair occurs.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from vlbench.data.chat_template import YI_VL
from vlbench.data.sample import ChatTurn
from vlbench.data.scene_dataset import CAPTION_PROMPTS
from vlbench.data.scene_families import (
    DOT_SHARE,
    draw_family,
    list_picture_questions,
    make_pictures,
    picture_caption,
)
from vlbench.data.scene_lattice import LATTICE
from vlbench.data.scene_lattice_text import COLUMN_NAMES, ROW_NAMES
from vlbench.data.scene_letters import LETTER_GRID, list_letter_questions, make_letter_scene
from vlbench.data.scene_text import (
    CELL_NAMES,
    CHINESE_WORDS,
    LANGUAGES,
    NUMBER_WORDS,
    SceneQuestion,
    draw_question,
    group_by_type,
    object_name,
    pick_questions,
)
from vlbench.data.scene_world import RenderedScene
from vlbench.miniatures.told_pictures import (
    RASTER_GRIDS,
    describe_line,
    describe_pictures,
    describe_raster,
)

TEXT_SCENE_STREAM = "words"  # stream of scenes; the images of fit come from others
TextPiece = tuple[str, bool]  # text, and whether it is supervised
FACT_WEIGHTS = {"gist": 50, "crowd": 50}  # pictures by family, in facts
TEXT_WEIGHTS = {"gist": 38, "crowd": 38, "glyphs": 10, "many": 14}  # in everything else
# How often each type is asked in drills of the pictures that allow it: what is hard more often.
DRILL_WEIGHTS = {"count": 4, "position": 2, "relation": 3, "place": 4}  # any other: 1
_WORDS_PER_DRILL, _WHOLE_RASTER_SHARE = 4, 0.25  # in drills that read letters
_FACTS_PER_DOCUMENT, _QUESTIONS_PER_DRILL, _QUESTIONS_PER_CHAT = 14, 10, 8  # in one document
_BLIND_CHAT_SHARE = 0.03  # chats without a description


def make_document(seed: int, index: int, grids: Sequence[int] = RASTER_GRIDS) -> list[TextPiece]:
    """Make document `index`: pictures in words and their caption, or a chat about them."""
    rng = random.Random(f"document/{seed}/{index}")
    pictures, language = _draw_pictures(rng, TEXT_WEIGHTS, seed, index)
    if len(pictures) == 1 and rng.random() < 0.2:
        told = describe_pictures(rng, pictures, language, grids) if rng.random() < 0.95 else ""
        return [(told, False), (picture_caption(pictures[0], language) + "\n", True)]
    return make_chat(rng, pictures, language, grids)


def make_facts(seed: int, index: int, grids: Sequence[int] = RASTER_GRIDS) -> list[TextPiece]:
    """Make a picture in words and a dozen short facts, each of which restates a part of it.

    A fact ("the star is red.") is almost all answer, so that binding (this colour with that shape)
    is learned before there are questions.
    """
    rng = random.Random(f"facts/{seed}/{index}")
    pictures, language = _draw_pictures(rng, FACT_WEIGHTS, seed, index)
    known = _list_facts(pictures[0], language)
    pieces: list[TextPiece] = [(describe_pictures(rng, pictures, language, grids), False)]
    for about, what, end in rng.choices(known, k=_FACTS_PER_DOCUMENT):
        pieces += [(about, False), (what, True), (end, False)]
    return pieces


def make_drill(seed: int, index: int, grids: Sequence[int] = RASTER_GRIDS) -> list[TextPiece]:
    """Make pictures in words and questions about them, each followed by its answer and no more."""
    rng = random.Random(f"drill/{seed}/{index}")
    pictures, language = _draw_pictures(rng, TEXT_WEIGHTS, seed, index)
    if pictures[0].grid == LETTER_GRID:
        return _make_reading_drill(rng, language, seed, index)
    pieces: list[TextPiece] = [(describe_pictures(rng, pictures, language, grids), False)]
    for one in _draw_drill(rng, list_picture_questions(pictures, language)):
        pieces += [(one.text, False), (f" {one.answer}", True), ("\n", False)]
    return pieces


def make_chat(
    rng: random.Random, pictures: Sequence[RenderedScene], language: str, grids: Sequence[int]
) -> list[TextPiece]:
    """Make a conversation in Yi's template in which words stand for the images."""
    turns: list[ChatTurn] = []
    if len(pictures) == 1 and rng.random() < 0.1:
        turns += _question_turns(CAPTION_PROMPTS[language], picture_caption(pictures[0], language))
    candidates = list_picture_questions(pictures, language)
    for asked in pick_questions(rng, candidates, _QUESTIONS_PER_CHAT):
        turns += _question_turns(asked.text, asked.answer)
    if rng.random() >= _BLIND_CHAT_SHARE:
        told = describe_pictures(rng, pictures, language, grids)
        turns[0] = ChatTurn("human", told + turns[0].text)
    return YI_VL.render_pieces(turns)


def _draw_pictures(
    rng: random.Random, weights: dict[str, int], seed: int, index: int
) -> tuple[tuple[RenderedScene, ...], str]:
    """Draw the pictures of a document and the language that is spoken about them."""
    family, has_dot = draw_family(rng, weights), rng.random() < DOT_SHARE
    pictures = make_pictures(family, TEXT_SCENE_STREAM, seed, index, has_dot)
    return pictures, rng.choice(LANGUAGES)


def _draw_drill(rng: random.Random, candidates: Sequence[SceneQuestion]) -> list[SceneQuestion]:
    """Draw questions by the weights of their types; the same may come again."""
    groups = group_by_type(candidates)
    weights = [DRILL_WEIGHTS.get(name, 1) for name in groups]
    kinds = rng.choices(list(groups), weights, k=_QUESTIONS_PER_DRILL)
    return [draw_question(rng, groups[kind]) for kind in kinds]


def _make_reading_drill(
    rng: random.Random, language: str, seed: int, index: int
) -> list[TextPiece]:
    """Tell several letter scenes, most of them by their line alone, and read each."""
    pieces: list[TextPiece] = []
    for number in range(_WORDS_PER_DRILL):
        scene = make_letter_scene(TEXT_SCENE_STREAM, seed, index * _WORDS_PER_DRILL + number)
        is_whole = rng.random() < _WHOLE_RASTER_SHARE
        told = describe_raster(scene, LETTER_GRID) if is_whole else describe_line(scene)
        [one] = list_letter_questions(scene, language)
        pieces += [(f"{told}\n{one.text}", False), (f" {one.answer}", True), ("\n", False)]
    return pieces


def _question_turns(question: str, answer: str) -> list[ChatTurn]:
    return [ChatTurn("human", question), ChatTurn("assistant", answer)]


def _list_facts(scene: RenderedScene, language: str) -> list[tuple[str, str, str]]:
    """List what can be said of the objects without doubt: (about what, what, full stop)."""
    zh = language == "zh"
    colours = Counter(thing.colour for thing in scene.objects)
    shapes = Counter(thing.shape for thing in scene.objects)
    pairs = Counter(thing.colour_shape for thing in scene.objects)
    verbs = {"is": "是", "at": "在", "are": "有"}
    known = []
    for thing in scene.objects:
        colour, shape = (
            _translate_word(thing.colour, language),
            _translate_word(thing.shape, language),
        )
        name, where = object_name(thing, language), _place_name(scene, thing.cell, language)
        known.append((where, "is", name))
        if shapes[thing.shape] == 1:
            known += [(shape, "is", colour), (shape, "at", where)]
        if colours[thing.colour] == 1:
            known += [(colour, "is", shape), (colour, "at", where)]
        if pairs[thing.colour_shape] == 1:
            known.append((name, "at", where))
    if scene.grid != LATTICE:
        for name, number in [*colours.items(), *shapes.items()]:
            many = NUMBER_WORDS[language][number - 1]
            known += [(_translate_word(name, language), "are", many)] * (1 if number == 1 else 2)
    return [
        (f"{about}{verbs[verb]}", what, "。") if zh else (f" the {about} {verb}", f" {what}", ".")
        for about, verb, what in known
    ]


def _place_name(scene: RenderedScene, cell: int, language: str) -> str:
    """Return the quarter of a gist scene, "top left", or the row and column of a lattice, "1a"."""
    if scene.grid != LATTICE:
        return CELL_NAMES[language][cell]
    row, column = divmod(cell, LATTICE)
    return ROW_NAMES[row] + COLUMN_NAMES[column]


def _translate_word(name: str, language: str) -> str:
    return CHINESE_WORDS[name] if language == "zh" else name
