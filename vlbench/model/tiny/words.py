"""Text of the rendered world without pictures: what the miniature language model learns from.

A scene is told in words, in many forms and in either language, standing where a picture would
stand. One of them is a "picture in words": a raster with a piece per cell, as an image is a raster
with a feature per patch. A cell of an object holds a `mark`, which is one piece of the tokenizer
and says colour, shape and place at once. No unseen pair ever occurs.
"""

from __future__ import annotations

import random
from collections import Counter

from vlbench.data.sample import Turn
from vlbench.data.scene_text import CELLS, LANGUAGES, NUMBERS, ZH, caption, noun, pick, questions
from vlbench.data.scene_world import SEEN_PAIRS, SIDE, Scene, Thing, scene
from vlbench.data.scenes import DESCRIBE
from vlbench.data.template import YI_VL

STREAM = "words"  # of scenes; pictures of fit come from other streams
GRIDS = (4, 8)  # cells of a raster's side: the patches at 56 and at 112 pixels
Piece = tuple[str, bool]  # text, and whether the model must learn to write it


def document(seed: int, index: int, grids: tuple[int, ...] = GRIDS) -> list[Piece]:
    """Make document `index`: a chat about a scene in words, or a scene in words and its caption."""
    rng = random.Random(f"document/{seed}/{index}")
    told = scene(STREAM, seed, index)
    if rng.random() < 0.25:
        return plain(rng, told, grids)
    language = rng.choice(LANGUAGES)
    return chat(rng, told, language, rng.randint(3, 6), rng.random() < 0.97, grids)


def lookups(seed: int, index: int) -> list[Piece]:
    """Make a scene in words and a dozen short lines that look something up in it.

    A line ("star: red", "star: top left") is almost all answer, so that binding (this colour with
    that shape) is learned before there are questions; without such lines the model only ever
    learned which colours and shapes are there.
    """
    rng = random.Random(f"lookups/{seed}/{index}")
    told = scene(STREAM, seed, index)
    language = rng.choice(LANGUAGES)
    pieces: list[Piece] = [(f"{describe(rng, told, (4,), phrases=0.7)}\n", False)]
    shapes = Counter(thing.shape for thing in told.things)
    colours = Counter(thing.colour for thing in told.things)
    asked = [
        (t.shape, what)
        for t in told.things
        if shapes[t.shape] == 1
        for what in (t.colour, CELLS["en"][t.cell])
    ]
    asked += [(t.colour, t.shape) for t in told.things if colours[t.colour] == 1]
    for _ in range(14 if asked else 0):
        key, value = rng.choice(asked)
        pieces += [(f"{_word(key, language)}:", False), (_word(value, language), True)]
        pieces += [("\n", False)]
    return pieces


def _word(name: str, language: str) -> str:
    if language == "en":
        return f" {name}"
    return ZH[name] if name in ZH else CELLS["zh"][CELLS["en"].index(name)]


def plain(rng: random.Random, told: Scene, grids: tuple[int, ...]) -> list[Piece]:
    """Tell a scene (not always), then its caption and a newline: the form of the caption stages."""
    text = describe(rng, told, grids) if rng.random() < 0.9 else ""
    return [(text, False), (caption(told, rng.choice(LANGUAGES)) + "\n", True)]


def chat(
    rng: random.Random,
    told: Scene,
    language: str,
    count: int,
    described: bool,
    grids: tuple[int, ...],
) -> list[Piece]:
    """Make a conversation in Yi's template in which words stand for the picture."""
    asked = [(q.text, q.answer) for q in pick(rng, questions(told, language), count)]
    if rng.random() < 0.1:
        asked.insert(0, (DESCRIBE[language], caption(told, language)))
    turns = []
    for number, (text, answer) in enumerate(asked):
        before = f"{describe(rng, told, grids)}\n" if described and number == 0 else ""
        turns += [Turn("human", before + text), Turn("assistant", answer)]
    return YI_VL.pieces(turns)


def marks() -> list[str]:
    """List the marks of all seen pairs in all places."""
    return [mark(pair, cell) for pair in SEEN_PAIRS for cell in range(4)]


def mark(pair: tuple[str, str], cell: int) -> str:
    """Write an object as one piece: "{red star, top left}"."""
    return f"{{{pair[0]} {pair[1]}, {CELLS['en'][cell]}}}"


def describe(
    rng: random.Random, told: Scene, grids: tuple[int, ...] = GRIDS, phrases: float = 0.2
) -> str:
    """Tell a scene in words: as a raster of marks, in sentences or a list, or in bare phrases.

    `phrases` is the share of the last form.
    """
    forms, rest = ("raster", "caption", "sentences", "list", "phrases"), 1 - phrases
    shares = (0.4 * rest, 0.2 * rest, 0.2 * rest, 0.2 * rest, phrases)
    form = rng.choices(forms, shares)[0]
    language = rng.choice(LANGUAGES)
    if form == "raster":
        return raster(told, rng.choice(grids))
    if form == "caption":
        return caption(told, language)
    things = list(told.things)
    rng.shuffle(things)
    return "".join(_told(thing, language, form) for thing in things).strip()


def _told(thing: Thing, language: str, form: str) -> str:
    where, what = CELLS[language][thing.cell], noun(thing, language)
    if form == "phrases":  # what follows on what is always the same: copying finds the binding
        return f"{what}{where}。" if language == "zh" else f" {what} {where}."
    if form == "list":
        return f"{where}：{what}\n" if language == "zh" else f"{where}: {what}\n"
    if language == "zh":
        return f"{where}有{NUMBERS['zh'][0]}{what}。"
    return f"There is a {what} at the {where}. "


def raster(told: Scene, grid: int) -> str:
    """Tell a scene as a picture in words: `grid` x `grid` cells row by row, full stops between."""
    cells = [" ."] * grid**2
    for thing in told.things:
        for cell in _covered(thing, grid):
            cells[cell] = mark(thing.pair, thing.cell)
    return "".join(cells)


def _covered(thing: Thing, grid: int) -> list[int]:
    """List the cells of its quarter that an object touches, at least one."""
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
    return [cell for rank, (away, cell) in enumerate(far) if not rank or away < 0.7 * thing.radius]
