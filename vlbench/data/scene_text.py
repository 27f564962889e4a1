"""The words of the rendered world, English and Chinese: captions, questions and answers.

Wording is regular on purpose: a word per colour, shape and place. `questions` lists all that can be
asked about a scene; `pick` draws some of them with answers that no guesser can predict.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from vlbench.data.scene_world import RenderedScene, SceneObject

QUESTION_TYPES = ("colour", "shape", "count", "position", "relation")
LANGUAGES = ("en", "zh")
CELL_NAMES = {
    "en": ("top left", "top right", "bottom left", "bottom right"),
    "zh": ("左上角", "右上角", "左下角", "右下角"),
}
SIDE_ANSWERS = {
    "en": ("To the left.", "To the right.", "Above.", "Below."),
    "zh": ("左边。", "右边。", "上边。", "下边。"),
}
NUMBER_WORDS = {"en": ("one", "two", "three", "four"), "zh": ("一个", "两个", "三个", "四个")}
TOTAL_QUESTIONS = {"en": "How many objects are there?", "zh": "图中有几个物体？"}
CHINESE_WORDS = {
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
IRREGULAR_PLURALS = {"cross": "crosses"}  # the others take an s
# How often all objects are counted, and how often each count of some of them is kept: with
# these, the answers to count questions come out nearly even.
_TOTAL_SHARE = (0.6, 0.2)  # where nothing occurs twice, and where something does
_COUNT_WEIGHTS = (1.0, 2.0, 40.0, 300.0)


@dataclass(frozen=True)
class SceneQuestion:
    """One question about a scene, and its answer."""

    type: str  # one of TYPES
    language: str  # one of LANGUAGES
    text: str
    answer: str
    relevant_pairs: tuple[
        tuple[str, str], ...
    ]  # the (colour, shape) pairs that the answer depends on


def object_name(scene_object: SceneObject, language: str) -> str:
    """Name an object: "red star", "红色的星形"; by shape alone if its colour has no name."""
    if not scene_object.colour:
        return CHINESE_WORDS[scene_object.shape] if language == "zh" else scene_object.shape
    if language == "zh":
        return f"{CHINESE_WORDS[scene_object.colour]}的{CHINESE_WORDS[scene_object.shape]}"
    return f"{scene_object.colour} {scene_object.shape}"


def position_phrase(scene_object: SceneObject, language: str) -> str:
    """Name an object's quarter: "at the top left", "左上角"."""
    where = CELL_NAMES[language][scene_object.cell]
    return where if language == "zh" else f"at the {where}"


def scene_caption(scene: RenderedScene, language: str) -> str:
    """Describe the scene in one sentence: the count, then every object in raster order."""
    count = NUMBER_WORDS[language][len(scene.objects) - 1]
    if language == "zh":
        items = [f"{position_phrase(t, 'zh')}是{object_name(t, 'zh')}" for t in scene.objects]
        return f"{count}物体：{'，'.join(items)}。"
    items = [f"a {object_name(t, 'en')} {position_phrase(t, 'en')}" for t in scene.objects]
    listed = items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
    return f"{count.capitalize()} object{'s' * (len(items) > 1)}: {listed}."


def list_questions(scene: RenderedScene, language: str) -> list[SceneQuestion]:
    """List every question about the scene in one language, in a fixed order."""
    return [
        *_attribute_questions(scene.objects, language),
        *_count_questions(scene.objects, language),
        *_position_questions(scene.objects, language),
        *_relation_questions(scene.objects, language),
    ]


def group_by_type(scene_questions: Sequence[SceneQuestion]) -> dict[str, list[SceneQuestion]]:
    """Sort questions by type, in the order of TYPES; a type that is not asked is absent."""
    groups = {kind: [one for one in scene_questions if one.type == kind] for kind in QUESTION_TYPES}
    return {kind: some for kind, some in groups.items() if some}


def pick_questions(
    rng: random.Random, candidates: Sequence[SceneQuestion], count: int
) -> list[SceneQuestion]:
    """Draw `count` different questions of types as mixed as the scene allows, in random order."""
    left = group_by_type(candidates)
    chosen: list[SceneQuestion] = []
    while len(chosen) < count:
        kinds = [kind for kind in left if left[kind]]
        if not kinds:
            break
        rng.shuffle(kinds)
        for kind in kinds[: count - len(chosen)]:
            one = draw_question(rng, left[kind])
            left[kind].remove(one)
            chosen.append(one)
    return chosen


def draw_question(rng: random.Random, candidates: Sequence[SceneQuestion]) -> SceneQuestion:
    """Draw one question of one type; counts are weighted so that all answers are as likely."""
    if candidates[0].type != "count":
        return rng.choice(candidates)
    total = [q for q in candidates if q.text == TOTAL_QUESTIONS[q.language]]
    parts = [q for q in candidates if q.text != TOTAL_QUESTIONS[q.language]]
    numbers = [_parse_count_answer(q.answer) for q in parts]
    share = _TOTAL_SHARE[any(number > 1 for number in numbers)]
    if not parts or (total and rng.random() < share):
        return total[0]
    often = Counter(numbers)
    weights = [_COUNT_WEIGHTS[n - 1] / often[n] for n in numbers]
    return rng.choices(parts, weights)[0]


def format_count_answer(number: int, language: str) -> str:
    """Write a count as an answer: "Two.", "两个。"."""
    word = NUMBER_WORDS[language][number - 1]
    return f"{word}。" if language == "zh" else f"{word.capitalize()}."


def _parse_count_answer(answer: str) -> int:
    words = NUMBER_WORDS["en"] + NUMBER_WORDS["zh"]
    return words.index(answer[:-1].lower()) % 4 + 1


def _attribute_questions(objects: Sequence[SceneObject], language: str) -> list[SceneQuestion]:
    """Ask the colour where the shape is unique, the shape where the colour is."""
    colours, shapes = Counter(t.colour for t in objects), Counter(t.shape for t in objects)
    zh, asked = language == "zh", []
    for t in objects:
        if shapes[t.shape] == 1:
            text = (
                f"{CHINESE_WORDS[t.shape]}是什么颜色的？"
                if zh
                else f"What colour is the {t.shape}?"
            )
            answer = f"{CHINESE_WORDS[t.colour]}。" if zh else f"{t.colour.capitalize()}."
            asked.append(SceneQuestion("colour", language, text, answer, (t.colour_shape,)))
    for t in objects:
        if colours[t.colour] == 1:
            text = f"{CHINESE_WORDS[t.colour]}的物体是什么形状的？"
            text = text if zh else f"What shape is the {t.colour} object?"
            answer = f"{CHINESE_WORDS[t.shape]}。" if zh else f"{t.shape.capitalize()}."
            asked.append(SceneQuestion("shape", language, text, answer, (t.colour_shape,)))
    return asked


def _count_questions(objects: Sequence[SceneObject], language: str) -> list[SceneQuestion]:
    """Ask how many objects there are, and how many of each shape and colour that is there."""
    zh = language == "zh"
    groups = {TOTAL_QUESTIONS[language]: list(objects)}
    for t in objects:
        plural = IRREGULAR_PLURALS.get(t.shape, f"{t.shape}s")
        text = f"图中有几个{CHINESE_WORDS[t.shape]}？" if zh else f"How many {plural} are there?"
        groups[text] = [o for o in objects if o.shape == t.shape]
        text = f"图中有几个{CHINESE_WORDS[t.colour]}的物体？"
        text = text if zh else f"How many {t.colour} objects are there?"
        groups[text] = [o for o in objects if o.colour == t.colour]
    return [
        SceneQuestion(
            "count",
            language,
            text,
            format_count_answer(len(some), language),
            tuple(o.colour_shape for o in some),
        )
        for text, some in groups.items()
    ]


def _position_questions(objects: Sequence[SceneObject], language: str) -> list[SceneQuestion]:
    """Ask where an object is: by its shape if that is enough, else by colour and shape."""
    shapes, pairs = Counter(t.shape for t in objects), Counter(t.colour_shape for t in objects)
    asked = []
    for t in objects:
        if pairs[t.colour_shape] > 1:
            continue
        if language == "zh":
            name = CHINESE_WORDS[t.shape] if shapes[t.shape] == 1 else object_name(t, "zh")
            text, answer = f"{name}在哪里？", f"{position_phrase(t, 'zh')}。"
        else:
            name = t.shape if shapes[t.shape] == 1 else object_name(t, "en")
            text, answer = f"Where is the {name}?", f"At the {CELL_NAMES['en'][t.cell]}."
        asked.append(SceneQuestion("position", language, text, answer, (t.colour_shape,)))
    return asked


def _relation_questions(objects: Sequence[SceneObject], language: str) -> list[SceneQuestion]:
    """Ask how one object lies to another in the same row or column."""
    pairs = Counter(t.colour_shape for t in objects)
    asked = []
    for a in objects:
        for b in objects:
            steps = a.cell ^ b.cell  # 1: same row, 2: same column, 3: diagonal
            if a is b or steps == 3 or pairs[a.colour_shape] > 1 or pairs[b.colour_shape] > 1:
                continue
            side = (2 if steps == 2 else 0) + (a.cell > b.cell)
            if language == "zh":
                text = f"{object_name(a, 'zh')}在{object_name(b, 'zh')}的哪一边？"
            else:
                text = (
                    f"Where is the {object_name(a, 'en')} relative to the {object_name(b, 'en')}?"
                )
            asked.append(
                SceneQuestion(
                    "relation",
                    language,
                    text,
                    SIDE_ANSWERS[language][side],
                    (a.colour_shape, b.colour_shape),
                )
            )
    return asked
