"""Text of the rendered world without pictures: what the miniature language model learns from.

A scene is told in words, in either language, standing where a picture would stand; then come facts,
a caption or a chat about it. Half of the scenes are told as a raster, cell by cell, with the words
of a cell written over one another, so that all of them stand at one position. That a position can
say several things is then learned from words, and `fit` has to teach only which features mean which
words. No unseen pair ever occurs.
"""

from __future__ import annotations

import random
from collections import Counter

from vlbench.data.sample import Turn
from vlbench.data.scene_text import (
    CELLS,
    LANGUAGES,
    NUMBERS,
    ZH,
    by_type,
    caption,
    draw,
    noun,
    pick,
    questions,
)
from vlbench.data.scene_world import SIDE, Scene, Thing, scene
from vlbench.data.scenes import DESCRIBE
from vlbench.data.template import YI_VL

STREAM = "words"  # of scenes; pictures of fit come from other streams
Piece = tuple[str, bool]  # text, and whether the model must learn to write it
_FACTS, _DRILLED, _QUESTIONS = 14, 10, 8  # in one document
_ABROAD = 0.2  # share of phrases in the language that the rest is not told in
FORMS = {"raster": 6, "phrases": 4, "list": 1, "sentences": 1}  # how often each
CELL, OVER = "\t", "\b"  # a cell of a raster begins or ends; the next word is written over the last
_GRIDS = (4, 4, 8)  # cells along a side: the patches at 56 pixels (more often) and at 112
_NEAR = 0.7  # a cell shows an object that is at most so many radii away


def document(seed: int, index: int) -> list[Piece]:
    """Make document `index`: a scene in words and its caption, or a chat about it."""
    rng = random.Random(f"document/{seed}/{index}")
    told = scene(STREAM, seed, index)
    if rng.random() < 0.25:
        text = describe(rng, told) if rng.random() < 0.9 else ""
        return [(text, False), (caption(told, rng.choice(LANGUAGES)) + "\n", True)]
    return chat(rng, told)


def facts(seed: int, index: int) -> list[Piece]:
    """Make a scene in words and a dozen short facts, each of which restates a part of it.

    A fact ("the star is red.") is almost all answer, so that binding (this colour with that shape)
    is learned before there are questions.
    """
    rng = random.Random(f"facts/{seed}/{index}")
    told = scene(STREAM, seed, index)
    known = _facts(told, rng.choice(LANGUAGES))
    pieces: list[Piece] = [(f"{describe(rng, told)}\n", False)]
    for about, what, end in rng.choices(known, k=_FACTS):
        pieces += [(about, False), (what, True), (end, False)]
    return pieces


def _facts(told: Scene, language: str) -> list[tuple[str, str, str]]:
    """List what can be said of the objects without doubt: (about what, what, full stop)."""
    zh = language == "zh"
    colours = Counter(thing.colour for thing in told.things)
    shapes = Counter(thing.shape for thing in told.things)
    pairs = Counter(thing.pair for thing in told.things)
    verbs = {"is": "是", "at": "在", "are": "有"}
    known = []
    for thing in told.things:
        colour, shape = _word(thing.colour, language), _word(thing.shape, language)
        name, where = noun(thing, language), CELLS[language][thing.cell]
        known.append((where, "is", name))
        if shapes[thing.shape] == 1:
            known += [(shape, "is", colour), (shape, "at", where)]
        if colours[thing.colour] == 1:
            known += [(colour, "is", shape), (colour, "at", where)]
        if pairs[thing.pair] == 1:
            known.append((name, "at", where))
    for name, number in [*colours.items(), *shapes.items()]:
        many = NUMBERS[language][number - 1]
        known += [(_word(name, language), "are", many)] * (1 if number == 1 else 2)
    return [
        (f"{about}{verbs[verb]}", what, "。") if zh else (f" the {about} {verb}", f" {what}", ".")
        for about, verb, what in known
    ]


def _word(name: str, language: str) -> str:
    return ZH[name] if language == "zh" else name


def drill(seed: int, index: int, counts: int = 1) -> list[Piece]:
    """Make a scene in words and questions about it, each followed by its answer and no more.

    `counts` says how much more often counts are asked than anything else.
    """
    rng = random.Random(f"drill/{seed}/{index}")
    told = scene(STREAM, seed, index)
    asked = by_type(questions(told, rng.choice(LANGUAGES)))
    kinds = [*asked] + ["count"] * (counts - 1)
    pieces: list[Piece] = [(f"{describe(rng, told)}\n", False)]
    for _ in range(_DRILLED):
        one = draw(rng, asked[rng.choice(kinds)])
        pieces += [(one.text, False), (f" {one.answer}", True), ("\n", False)]
    return pieces


def chat(rng: random.Random, told: Scene) -> list[Piece]:
    """Make a conversation in Yi's template in which words stand for the picture."""
    language = rng.choice(LANGUAGES)
    turns: list[Turn] = []
    if rng.random() < 0.1:
        turns += _exchange(DESCRIBE[language], caption(told, language))
    for asked in pick(rng, questions(told, language), _QUESTIONS):
        turns += _exchange(asked.text, asked.answer)
    if rng.random() < 0.97:
        turns[0] = Turn("human", f"{describe(rng, told)}\n{turns[0].text}")
    return YI_VL.pieces(turns)


def _exchange(question: str, answer: str) -> list[Turn]:
    return [Turn("human", question), Turn("assistant", answer)]


def describe(rng: random.Random, told: Scene) -> str:
    """Tell a scene in one of the forms; all but a raster tell the objects in random order.

    They may tell an object several times, with full stops in between: so it is with the patches of
    a picture, of which many show the same object, and many show none.
    """
    form = rng.choices(list(FORMS), list(FORMS.values()))[0]
    home = rng.choice(LANGUAGES)
    if form == "raster":
        return raster(told, home, rng.choice(_GRIDS))
    away = LANGUAGES[1 - LANGUAGES.index(home)]
    parts = [
        _told(thing, away if rng.random() < _ABROAD else home, form)
        for thing in told.things
        for _ in range(rng.choice((1, 1, 2, 2, 3)))
    ]
    parts += [" ."] * rng.choice((0, 2, 4, 8))
    rng.shuffle(parts)
    return "".join(parts).strip()


def raster(told: Scene, language: str, grid: int) -> str:
    """Tell a scene as `grid` x `grid` cells row by row: words over one another, or a full stop."""
    cells = [" ."] * grid**2
    for thing in told.things:
        where = CELLS[language][thing.cell]
        words = [_word(thing.colour, language), _word(thing.shape, language), *where.split()]
        text = OVER.join(words if language == "zh" else [f" {word}" for word in words])
        for cell in _covered(thing, grid):
            cells[cell] = text
    return CELL + CELL.join(cells) + CELL


def _covered(thing: Thing, grid: int) -> list[int]:
    """List the cells that show an object: those of its quarter that it touches, at least one."""
    pixels = SIDE / grid
    far = []
    for cell in range(grid**2):
        row, column = divmod(cell, grid)
        if 2 * row // grid * 2 + 2 * column // grid != thing.cell:
            continue
        across = max(abs((column + 0.5) * pixels - thing.x) - pixels / 2, 0)
        down = max(abs((row + 0.5) * pixels - thing.y) - pixels / 2, 0)
        far.append(((across**2 + down**2) ** 0.5, cell))
    far.sort()
    return [
        cell for rank, (away, cell) in enumerate(far) if not rank or away < _NEAR * thing.radius
    ]


def _told(thing: Thing, language: str, form: str) -> str:
    where, what = CELLS[language][thing.cell], noun(thing, language)
    if form == "phrases":
        return f"{what}{where}。" if language == "zh" else f" {what} {where}."
    if form == "list":
        return f"{where}：{what}\n" if language == "zh" else f" {where}: {what}\n"
    if language == "zh":
        return f"{where}有{NUMBERS['zh'][0]}{what}。"
    return f" There is a {what} at the {where}."
