"""The words of the rendered world, English and Chinese, and the texts of gist scenes.

Wording is regular on purpose: one word per colour, shape and position. `list_questions` lists all
questions about a scene; `pick_questions` draws some of them with answers that cannot be guessed
without the image.
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
# With these, the answers to count questions are nearly uniform.
_TOTAL_SHARE = (0.6, 0.2)  # of questions about all objects: no repeated count, some repeated count
_COUNT_WEIGHTS = (1.0, 2.0, 40.0, 300.0)  # of questions about some objects, by their count


@dataclass(frozen=True)
class SceneQuestion:
    """One question about a scene, and its answer."""

    type: str  # one of QUESTION_TYPES, or a family other than gist
    language: str  # one of LANGUAGES
    text: str
    answer: str
    relevant_pairs: tuple[tuple[str, str], ...]  # (colour, shape) pairs that determine the answer
    relevant_cells: tuple[int, ...] = ()  # cells of these objects, where pairs do not name them
    picture: int = 0  # which of several pictures it is about, from 0


def object_name(scene_object: SceneObject, language: str) -> str:
    """Return the name of an object: "red star", "红色的星形"; its shape if it has no colour."""
    if not scene_object.colour:
        return CHINESE_WORDS[scene_object.shape] if language == "zh" else scene_object.shape
    if language == "zh":
        return f"{CHINESE_WORDS[scene_object.colour]}的{CHINESE_WORDS[scene_object.shape]}"
    return f"{scene_object.colour} {scene_object.shape}"


def position_phrase(scene_object: SceneObject, language: str) -> str:
    """Return where an object is: "at the top left", "左上角"."""
    cell_name = CELL_NAMES[language][scene_object.cell]
    return cell_name if language == "zh" else f"at the {cell_name}"


def scene_caption(scene: RenderedScene, language: str) -> str:
    """Return one sentence about the scene: the count, then every object in raster order."""
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
        *list_attribute_questions(scene.objects, language),
        *_count_questions(scene.objects, language),
        *_position_questions(scene.objects, language),
        *_relation_questions(scene.objects, language),
    ]


def group_by_type(scene_questions: Sequence[SceneQuestion]) -> dict[str, list[SceneQuestion]]:
    """Group questions by type, in the order in which types occur first."""
    groups: dict[str, list[SceneQuestion]] = {}
    for question in scene_questions:
        groups.setdefault(question.type, []).append(question)
    return groups


def pick_questions(
    rng: random.Random, candidates: Sequence[SceneQuestion], count: int
) -> list[SceneQuestion]:
    """Draw `count` different questions of types as mixed as the scene allows, in random order."""
    remaining = group_by_type(candidates)
    chosen: list[SceneQuestion] = []
    while len(chosen) < count:
        types = [name for name in remaining if remaining[name]]
        if not types:
            break
        rng.shuffle(types)
        for name in types[: count - len(chosen)]:
            question = draw_question(rng, remaining[name])
            remaining[name].remove(question)
            chosen.append(question)
    return chosen


def draw_question(rng: random.Random, candidates: Sequence[SceneQuestion]) -> SceneQuestion:
    """Draw one question of one type; counts are weighted so that all answers are equally likely."""
    if candidates[0].type != "count":
        return rng.choice(candidates)
    about_all = [q for q in candidates if q.text == TOTAL_QUESTIONS[q.language]]
    about_some = [q for q in candidates if q.text != TOTAL_QUESTIONS[q.language]]
    counts = [_parse_count_answer(q.answer) for q in about_some]
    total_share = _TOTAL_SHARE[any(count > 1 for count in counts)]
    if not about_some or (about_all and rng.random() < total_share):
        return about_all[0]
    frequencies = Counter(counts)
    weights = [_COUNT_WEIGHTS[count - 1] / frequencies[count] for count in counts]
    return rng.choices(about_some, weights)[0]


def format_count_answer(number: int, language: str) -> str:
    """Return a count as an answer: "Two.", "两个。"."""
    word = NUMBER_WORDS[language][number - 1]
    return f"{word}。" if language == "zh" else f"{word.capitalize()}."


def _parse_count_answer(answer: str) -> int:
    words = NUMBER_WORDS["en"] + NUMBER_WORDS["zh"]
    return words.index(answer[:-1].lower()) % 4 + 1


def list_attribute_questions(objects: Sequence[SceneObject], language: str) -> list[SceneQuestion]:
    """Ask for the colour of a unique shape, and for the shape of a unique colour."""
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
    """Ask for the number of objects, and of those of each shape and colour that occurs."""
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
            format_count_answer(len(counted), language),
            tuple(o.colour_shape for o in counted),
        )
        for text, counted in groups.items()
    ]


def _position_questions(objects: Sequence[SceneObject], language: str) -> list[SceneQuestion]:
    """Ask where an object is, named by its shape if that is unique, else by colour and shape."""
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
    """Ask on which side of another object one is, both in the same row or column."""
    pairs = Counter(t.colour_shape for t in objects)
    asked = []
    for a in objects:
        for b in objects:
            offset = a.cell ^ b.cell  # 1: same row, 2: same column, 3: diagonal
            if a is b or offset == 3 or pairs[a.colour_shape] > 1 or pairs[b.colour_shape] > 1:
                continue
            side = (2 if offset == 2 else 0) + (a.cell > b.cell)
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
