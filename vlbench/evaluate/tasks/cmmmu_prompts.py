"""How scripts that evaluate on CMMMU ask its questions: text and pictures of each protocol."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from vlbench.data.image_processing import ZeroImage
from vlbench.data.sample import LazyImage
from vlbench.evaluate.tasks.benchmark_types import (
    BenchmarkPrompt,
    BenchmarkRecord,
    GenerationLimits,
    SkippedRecord,
    has_option,
)
from vlbench.evaluate.tasks.cmmmu_data import CHOICE_TYPE, GAP_TYPE, JUDGEMENT_TYPE

IMAGE_TAG = re.compile(r'<img="(.*?)">')
NUMBERED_TAG = re.compile(r"<图片 (\d+)>")  # what the scripts make of a record's own tags
QUESTION_TEMPLATE = "\n\n问题：{question}\n正确答案：\n"
TEMPLATES_BY_TYPE = {
    CHOICE_TYPE: "请回答以下多项选择题，并选出正确选项。这些题目可能包括单选和多选题型。"
    "如果所提供的信息不足以确定一个明确的答案，那么请根据可用的数据和你的判断来选择最可能正确的选项。\n\n"
    "问题：{question}\n选项：\n{options}\n正确答案：\n",
    JUDGEMENT_TYPE: "请回答以下判断题，并根据题目描述和所给的信息来判断问题中陈述的对错。"
    "如果信息不完整或不足以作出绝对判断，请运用你的逻辑推理和现有信息来做出最可能的判断。"
    + QUESTION_TEMPLATE,
    GAP_TYPE: "请回答以下填空题，并根据题目的要求和所提供的信息来给出最恰当的答案。"
    "如果信息不足以确切回答，那么请依据现有的数据和你的推理能力来填写最合理的答案。"
    + QUESTION_TEMPLATE,
}
"""Text of a question by its type, in every protocol; an unknown type is asked as FILL."""


@dataclass(frozen=True)
class CmmmuPromptProtocol:
    """A way to ask CMMMU's questions."""

    question_and_options: Callable[[BenchmarkRecord], tuple[str, list[str]]]
    """Question and options as they go into the text; raises Skipped."""
    rewrite_tags: Callable[[BenchmarkRecord, str], str]
    """What becomes of tags in the whole text."""
    select_images: Callable[[BenchmarkRecord, str], tuple[LazyImage, ...]]
    """What is shown beside the text; raises Skipped."""
    generation_limits: GenerationLimits


def build_prompt(record: BenchmarkRecord, protocol: CmmmuPromptProtocol) -> BenchmarkPrompt:
    """Return the prompt of a record, or raise Skipped."""
    question, options = protocol.question_and_options(record)
    lines = "".join(
        f"({chr(ord('A') + number)}) {option}\n" for number, option in enumerate(options)
    )
    template = TEMPLATES_BY_TYPE.get(record.type, TEMPLATES_BY_TYPE[GAP_TYPE])
    text = protocol.rewrite_tags(record, template.format(question=question, options=lines))
    return BenchmarkPrompt(text, protocol.select_images(record, text))


def _image_tag(file_name: str) -> str:
    return f'<img="{file_name}">'


def _files_with_prefix(record: BenchmarkRecord, prefix: str) -> list[str]:
    """Return the pictures of the question (q_) or of the options (a_)."""
    return [file for file in record.images if file.startswith(prefix)]


def _yi_question_and_options(record: BenchmarkRecord) -> tuple[str, list[str]]:
    """Take out the tags of the question's pictures and of the options'.

    Where options have the same text, the letters after it shift. The script looks up what the
    right letters then mean, and breaks where they mean nothing or the answer is withheld.
    """
    question = record.question
    for file in _files_with_prefix(record, "q_"):
        question = question.replace(_image_tag(file), "")
    options = _yi_options(record)
    if record.answer is None:
        raise SkippedRecord(
            "its answer is withheld: the reference reads it before it asks, and breaks"
        )
    letters = record.answer if record.type == CHOICE_TYPE else ()
    if not all(has_option(letter, options) for letter in letters):
        has = f"{len(options)} different options"
        raise SkippedRecord(
            f"its answer is {record.answer}, and it has {has}: the reference breaks"
        )
    return question, options


def _yi_options(record: BenchmarkRecord) -> list[str]:
    """Return the options without their pictures' tags; those with the same text become one.

    The last digit of a picture's name is the number of its option. One picture alone belongs to
    none, and its tag stays.
    """
    owners = dict.fromkeys(record.options, "")
    files = _files_with_prefix(record, "a_") if record.type == CHOICE_TYPE else []
    for file in files if len(files) > 1 else []:
        digit = file.split("_")[-1].split(".")[0][-1:]
        if digit not in [str(number + 1) for number in range(len(record.options))]:
            raise SkippedRecord(f"its picture {file} belongs to no option: the reference breaks")
        owners[record.options[int(digit) - 1]] = file
    return [text.replace(_image_tag(file), "") if file else text for text, file in owners.items()]


def _yi_images(record: BenchmarkRecord, _: str) -> tuple[LazyImage, ...]:
    """Show the question's first picture; zeros where the options have two.

    Tags that are left in the options count as pictures where the question has none.
    """
    questions, options = _files_with_prefix(record, "q_"), _files_with_prefix(record, "a_")
    if not questions:
        options += [file for option in _yi_options(record) for file in IMAGE_TAG.findall(option)]
    if len(options) <= 1 and not questions:
        raise SkippedRecord("has no picture in its question: the reference leaves it out")
    if questions and record.type not in TEMPLATES_BY_TYPE:
        raise SkippedRecord(f"its type is {record.type}: the reference leaves it out")
    return (ZeroImage(),) if len(options) > 1 else (record.images[questions[0]],)


def _drop_numbered_tags(_: BenchmarkRecord, text: str) -> str:
    return NUMBERED_TAG.sub("", text)


def _unchanged_parts(record: BenchmarkRecord) -> tuple[str, list[str]]:
    return record.question, list(record.options)


def _number_tags(record: BenchmarkRecord, text: str) -> str:
    """Number the tags by the pictures' places in the data."""
    for number, file in enumerate(record.images, start=1):
        text = text.replace(_image_tag(file), f"<图片 {number}>")
    return text


def _cited_images(record: BenchmarkRecord, text: str) -> tuple[LazyImage, ...]:
    """Show the pictures that the text cites, in its order, each as often as it is cited."""
    pictures = {str(number): one for number, one in enumerate(record.images.values(), start=1)}
    for number in NUMBERED_TAG.findall(text):
        if number not in pictures:
            raise SkippedRecord(
                f"cites picture {number}, which it does not have: the reference breaks"
            )
    return tuple(pictures[number] for number in NUMBERED_TAG.findall(text))


YI_PROTOCOL = CmmmuPromptProtocol(
    _yi_question_and_options, _drop_numbered_tags, _yi_images, GenerationLimits(64, stop="###")
)
"""01-ai/Yi, VL/llava/eval/01_eval_cmmmu.py of January 2024."""
LMMS_PROTOCOL = CmmmuPromptProtocol(
    _unchanged_parts, _number_tags, _cited_images, GenerationLimits(16)
)
"""lmms-eval of 2026, tasks cmmmu_val and cmmmu_test."""
PROMPT_PROTOCOLS = {"yi": YI_PROTOCOL, "lmms": LMMS_PROTOCOL}
