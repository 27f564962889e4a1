"""The words of the rendered world, English and Chinese: captions, questions and answers.

Wording is regular on purpose: a word per colour, shape and place. `questions` lists all that can be
asked about a scene; `pick` draws some of them with answers that no guesser can predict.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from vlbench.data.scene_world import Scene, Thing

TYPES = ("colour", "shape", "count", "position", "relation")
LANGUAGES = ("en", "zh")
CELLS = {
    "en": ("top left", "top right", "bottom left", "bottom right"),
    "zh": ("左上角", "右上角", "左下角", "右下角"),
}
SIDES = {
    "en": ("To the left.", "To the right.", "Above.", "Below."),
    "zh": ("左边。", "右边。", "上边。", "下边。"),
}
NUMBERS = {"en": ("one", "two", "three", "four"), "zh": ("一个", "两个", "三个", "四个")}
TOTAL = {"en": "How many objects are there?", "zh": "图中有几个物体？"}
ZH = {
    "red": "红色",
    "yellow": "黄色",
    "green": "绿色",
    "blue": "蓝色",
    "purple": "紫色",
    "black": "黑色",
    "circle": "圆形",
    "square": "方形",
    "triangle": "三角形",
    "star": "星形",
    "cross": "十字形",
    "heart": "心形",
}
PLURAL = {"cross": "crosses"}  # the others take an s
# How often all objects are counted, and how often each count of some of them is kept: with
# these, the answers to count questions come out nearly even.
_TOTAL_SHARE = (0.6, 0.2)  # where nothing occurs twice, and where something does
_COUNT_WEIGHTS = (1.0, 2.0, 40.0, 300.0)


@dataclass(frozen=True)
class Asked:
    """One question about a scene, and its answer."""

    type: str  # one of TYPES
    language: str  # one of LANGUAGES
    text: str
    answer: str
    about: tuple[tuple[str, str], ...]  # the (colour, shape) pairs that the answer depends on


def noun(thing: Thing, language: str) -> str:
    """Name an object: "red star", "红色的星形"; by shape alone if its colour has no name."""
    if not thing.colour:
        return ZH[thing.shape] if language == "zh" else thing.shape
    if language == "zh":
        return f"{ZH[thing.colour]}的{ZH[thing.shape]}"
    return f"{thing.colour} {thing.shape}"


def place(thing: Thing, language: str) -> str:
    """Name an object's quarter: "at the top left", "左上角"."""
    where = CELLS[language][thing.cell]
    return where if language == "zh" else f"at the {where}"


def caption(scene: Scene, language: str) -> str:
    """Describe the scene in one sentence: the count, then every object in raster order."""
    count = NUMBERS[language][len(scene.things) - 1]
    if language == "zh":
        items = [f"{place(t, 'zh')}是{noun(t, 'zh')}" for t in scene.things]
        return f"{count}物体：{'，'.join(items)}。"
    items = [f"a {noun(t, 'en')} {place(t, 'en')}" for t in scene.things]
    listed = items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
    return f"{count.capitalize()} object{'s' * (len(items) > 1)}: {listed}."


def questions(scene: Scene, language: str) -> list[Asked]:
    """List every question about the scene in one language, in a fixed order."""
    return [
        *_attributes(scene.things, language),
        *_counts(scene.things, language),
        *_positions(scene.things, language),
        *_relations(scene.things, language),
    ]


def by_type(asked: Sequence[Asked]) -> dict[str, list[Asked]]:
    """Sort questions by type, in the order of TYPES; a type that is not asked is absent."""
    groups = {kind: [one for one in asked if one.type == kind] for kind in TYPES}
    return {kind: some for kind, some in groups.items() if some}


def pick(rng: random.Random, asked: Sequence[Asked], count: int) -> list[Asked]:
    """Draw `count` different questions of types as mixed as the scene allows, in random order."""
    left = by_type(asked)
    chosen: list[Asked] = []
    while len(chosen) < count:
        kinds = [kind for kind in left if left[kind]]
        if not kinds:
            break
        rng.shuffle(kinds)
        for kind in kinds[: count - len(chosen)]:
            one = draw(rng, left[kind])
            left[kind].remove(one)
            chosen.append(one)
    return chosen


def draw(rng: random.Random, asked: Sequence[Asked]) -> Asked:
    """Draw one question of one type; counts are weighted so that all answers are as likely."""
    if asked[0].type != "count":
        return rng.choice(asked)
    total = [q for q in asked if q.text == TOTAL[q.language]]
    parts = [q for q in asked if q.text != TOTAL[q.language]]
    numbers = [_number(q.answer) for q in parts]
    share = _TOTAL_SHARE[any(number > 1 for number in numbers)]
    if not parts or (total and rng.random() < share):
        return total[0]
    often = Counter(numbers)
    weights = [_COUNT_WEIGHTS[n - 1] / often[n] for n in numbers]
    return rng.choices(parts, weights)[0]


def answer_number(number: int, language: str) -> str:
    """Write a count as an answer: "Two.", "两个。"."""
    word = NUMBERS[language][number - 1]
    return f"{word}。" if language == "zh" else f"{word.capitalize()}."


def _number(answer: str) -> int:
    words = NUMBERS["en"] + NUMBERS["zh"]
    return words.index(answer[:-1].lower()) % 4 + 1


def _attributes(things: Sequence[Thing], language: str) -> list[Asked]:
    """Ask the colour where the shape is unique, the shape where the colour is."""
    colours, shapes = Counter(t.colour for t in things), Counter(t.shape for t in things)
    zh, asked = language == "zh", []
    for t in things:
        if shapes[t.shape] == 1:
            text = f"{ZH[t.shape]}是什么颜色的？" if zh else f"What colour is the {t.shape}?"
            answer = f"{ZH[t.colour]}。" if zh else f"{t.colour.capitalize()}."
            asked.append(Asked("colour", language, text, answer, (t.pair,)))
    for t in things:
        if colours[t.colour] == 1:
            text = f"{ZH[t.colour]}的物体是什么形状的？"
            text = text if zh else f"What shape is the {t.colour} object?"
            answer = f"{ZH[t.shape]}。" if zh else f"{t.shape.capitalize()}."
            asked.append(Asked("shape", language, text, answer, (t.pair,)))
    return asked


def _counts(things: Sequence[Thing], language: str) -> list[Asked]:
    """Ask how many objects there are, and how many of each shape and colour that is there."""
    zh = language == "zh"
    groups = {TOTAL[language]: list(things)}
    for t in things:
        plural = PLURAL.get(t.shape, f"{t.shape}s")
        text = f"图中有几个{ZH[t.shape]}？" if zh else f"How many {plural} are there?"
        groups[text] = [o for o in things if o.shape == t.shape]
        text = f"图中有几个{ZH[t.colour]}的物体？"
        text = text if zh else f"How many {t.colour} objects are there?"
        groups[text] = [o for o in things if o.colour == t.colour]
    return [
        Asked(
            "count", language, text, answer_number(len(some), language), tuple(o.pair for o in some)
        )
        for text, some in groups.items()
    ]


def _positions(things: Sequence[Thing], language: str) -> list[Asked]:
    """Ask where an object is: by its shape if that is enough, else by colour and shape."""
    shapes, pairs = Counter(t.shape for t in things), Counter(t.pair for t in things)
    asked = []
    for t in things:
        if pairs[t.pair] > 1:
            continue
        if language == "zh":
            name = ZH[t.shape] if shapes[t.shape] == 1 else noun(t, "zh")
            text, answer = f"{name}在哪里？", f"{place(t, 'zh')}。"
        else:
            name = t.shape if shapes[t.shape] == 1 else noun(t, "en")
            text, answer = f"Where is the {name}?", f"At the {CELLS['en'][t.cell]}."
        asked.append(Asked("position", language, text, answer, (t.pair,)))
    return asked


def _relations(things: Sequence[Thing], language: str) -> list[Asked]:
    """Ask how one object lies to another in the same row or column."""
    pairs = Counter(t.pair for t in things)
    asked = []
    for a in things:
        for b in things:
            steps = a.cell ^ b.cell  # 1: same row, 2: same column, 3: diagonal
            if a is b or steps == 3 or pairs[a.pair] > 1 or pairs[b.pair] > 1:
                continue
            side = (2 if steps == 2 else 0) + (a.cell > b.cell)
            if language == "zh":
                text = f"{noun(a, 'zh')}在{noun(b, 'zh')}的哪一边？"
            else:
                text = f"Where is the {noun(a, 'en')} relative to the {noun(b, 'en')}?"
            asked.append(Asked("relation", language, text, SIDES[language][side], (a.pair, b.pair)))
    return asked
