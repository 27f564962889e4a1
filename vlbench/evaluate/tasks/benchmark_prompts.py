"""How scripts that evaluate on MMMU and CMMMU ask the questions: text and images, by protocol."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from vlbench.data.image_processing import ZeroImage
from vlbench.data.sample import LazyImage
from vlbench.errors import UserError, suggest_name
from vlbench.evaluate.tasks.benchmark_types import (
    CMMMU_CHOICE_TYPE,
    CMMMU_FILL_IN_TYPE,
    CMMMU_JUDGEMENT_TYPE,
    MMMU_CHOICE_TYPE,
    BenchmarkPrompt,
    BenchmarkRecord,
    GenerationLimits,
    SkippedRecord,
    has_option,
)


class PromptProtocol(Protocol):
    """A way to ask the questions of a benchmark."""

    @property
    def generation_limits(self) -> GenerationLimits:
        """How a model may answer."""
        ...

    def build_prompt(self, record: BenchmarkRecord) -> BenchmarkPrompt:
        """Return the prompt of a record, or raise SkippedRecord."""
        ...


# MMMU.

MMMU_IMAGE_TAG = re.compile(r"<image (\d+)>")
FIRST_IMAGE = "image_1"


@dataclass(frozen=True)
class MmmuPromptProtocol:
    """A way to ask MMMU's questions."""

    option_template: str
    """One line of `{options}`: `{letter}` and `{text}`; image tags in options always stay."""
    choice_template: str
    """Text of a multiple-choice question: `{question}` and `{options}`."""
    open_template: str
    """Text of any other: `{question}`."""
    keeps_tags: bool
    """Whether image tags stay in the question."""
    select_images: Callable[[BenchmarkRecord], tuple[LazyImage, ...]]
    """The images that the model gets; raises SkippedRecord."""
    needs_answer: bool
    """Whether the script looks up the option of the right letter, and fails where none is."""
    generation_limits: GenerationLimits

    def build_prompt(self, record: BenchmarkRecord) -> BenchmarkPrompt:
        """Return the prompt of a record, or raise SkippedRecord."""
        if self.needs_answer:
            _check_answer_letter(record)
        images = self.select_images(record)
        question = record.question if self.keeps_tags else MMMU_IMAGE_TAG.sub("", record.question)
        options = "".join(
            self.option_template.format(letter=chr(ord("A") + index), text=text)
            for index, text in enumerate(record.options)
        )
        is_choice = record.type == MMMU_CHOICE_TYPE
        template = self.choice_template if is_choice else self.open_template
        return BenchmarkPrompt(template.format(question=question, options=options), images)


def _check_answer_letter(record: BenchmarkRecord) -> None:
    if record.type != MMMU_CHOICE_TYPE or record.answer is None:
        return  # withheld as "?", which the scripts accept
    if not isinstance(record.answer, str) or not has_option(record.answer, record.options):
        known = f"its {len(record.options)} options"
        raise SkippedRecord(
            f"its answer is {record.answer!r}, none of {known}: the reference breaks"
        )


def _first_image_or_zero(record: BenchmarkRecord) -> tuple[LazyImage, ...]:
    """Return image_1, whatever is cited; zeros where it is missing or options cite two images.

    Yi's script counts tags of options twice where the question has none, so there one is enough.
    """
    cited = sum(len(MMMU_IMAGE_TAG.findall(option)) for option in record.options)
    if not MMMU_IMAGE_TAG.search(record.question):
        cited *= 2
    return (ZeroImage() if cited > 1 else record.images.get(FIRST_IMAGE, ZeroImage()),)


def _first_image(record: BenchmarkRecord) -> tuple[LazyImage, ...]:
    """Return image_1, whatever is cited."""
    if FIRST_IMAGE not in record.images:
        raise SkippedRecord("has no image_1: the reference draws a letter and does not ask")
    return (record.images[FIRST_IMAGE],)


def _cited_columns(record: BenchmarkRecord) -> tuple[LazyImage, ...]:
    """Return every image that is cited, once, sorted by the name of its column."""
    texts = (record.question, *(record.options if record.type == MMMU_CHOICE_TYPE else ()))
    columns = sorted({f"image_{n}" for text in texts for n in MMMU_IMAGE_TAG.findall(text)})
    for column in columns:
        if column not in record.images:
            raise SkippedRecord(f"cites {column}, which it does not have: the reference breaks")
    return tuple(record.images[column] for column in columns)


LETTER_INSTRUCTION = "Answer with the option's letter from the given choices directly."
PHRASE_INSTRUCTION = "Answer the question using a single word or phrase."
MMMU_YI = MmmuPromptProtocol(
    option_template="{letter}. {text}\n",
    choice_template=f"{{question}}\n{{options}}\n{LETTER_INSTRUCTION}",
    open_template=f"{{question}}\n{PHRASE_INSTRUCTION}",
    keeps_tags=False,
    select_images=_first_image_or_zero,
    needs_answer=True,
    generation_limits=GenerationLimits(max_new_tokens=64, stop="###"),
)
"""01-ai/Yi, VL/llava/eval/01_eval_mmmu.py of January 2024."""
MMMU_OFFICIAL = replace(
    MMMU_YI,
    option_template="({letter}) {text}\n",
    keeps_tags=True,
    select_images=_first_image,
    generation_limits=GenerationLimits(
        128, reference_difference="the reference samples at temperature 1, over 5 beams"
    ),
)
"""MMMU-Benchmark/MMMU, run_llava.py."""
MMMU_LMMS = MmmuPromptProtocol(
    option_template="{letter}. {text}\n",
    choice_template=f"{{question}}\n{{options}}\n{LETTER_INSTRUCTION}",
    open_template=f"{{question}}\n\n{PHRASE_INSTRUCTION}",
    keeps_tags=True,
    select_images=_cited_columns,
    needs_answer=False,
    generation_limits=GenerationLimits(max_new_tokens=128),
)
"""lmms-eval of 2026, task mmmu_val, for models that take text and images separately."""
MMMU_LMMS_TEST = replace(
    MMMU_LMMS,
    choice_template="{question}\n{options}\n",
    open_template="{question}\n\n",
    generation_limits=GenerationLimits(max_new_tokens=512),
)
"""The same, task mmmu_test: it gives no instruction."""


# CMMMU.

CMMMU_IMAGE_TAG = re.compile(r'<img="(.*?)">')
NUMBERED_TAG = re.compile(r"<图片 (\d+)>")  # what the scripts make of a record's own tags
QUESTION_TEMPLATE = "\n\n问题：{question}\n正确答案：\n"
TEMPLATES_BY_TYPE = {
    CMMMU_CHOICE_TYPE: "请回答以下多项选择题，并选出正确选项。这些题目可能包括单选和多选题型。"
    "如果所提供的信息不足以确定一个明确的答案，那么请根据可用的数据和你的判断来选择最可能正确的选项。\n\n"
    "问题：{question}\n选项：\n{options}\n正确答案：\n",
    CMMMU_JUDGEMENT_TYPE: "请回答以下判断题，并根据题目描述和所给的信息来判断问题中陈述的对错。"
    "如果信息不完整或不足以作出绝对判断，请运用你的逻辑推理和现有信息来做出最可能的判断。"
    + QUESTION_TEMPLATE,
    CMMMU_FILL_IN_TYPE: "请回答以下填空题，并根据题目的要求和所提供的信息来给出最恰当的答案。"
    "如果信息不足以确切回答，那么请依据现有的数据和你的推理能力来填写最合理的答案。"
    + QUESTION_TEMPLATE,
}
"""Text of a question by its type, in every protocol; an unknown type is asked as 填空."""


@dataclass(frozen=True)
class CmmmuPromptProtocol:
    """A way to ask CMMMU's questions."""

    question_and_options: Callable[[BenchmarkRecord], tuple[str, list[str]]]
    """Question and options as they go into the text; raises SkippedRecord."""
    rewrite_tags: Callable[[BenchmarkRecord, str], str]
    """Replaces the image tags of the whole text."""
    select_images: Callable[[BenchmarkRecord, str], tuple[LazyImage, ...]]
    """The images that the model gets with the text; raises SkippedRecord."""
    generation_limits: GenerationLimits

    def build_prompt(self, record: BenchmarkRecord) -> BenchmarkPrompt:
        """Return the prompt of a record, or raise SkippedRecord."""
        question, options = self.question_and_options(record)
        lines = "".join(
            f"({chr(ord('A') + index)}) {option}\n" for index, option in enumerate(options)
        )
        template = TEMPLATES_BY_TYPE.get(record.type, TEMPLATES_BY_TYPE[CMMMU_FILL_IN_TYPE])
        text = self.rewrite_tags(record, template.format(question=question, options=lines))
        return BenchmarkPrompt(text, self.select_images(record, text))


def _image_tag(file_name: str) -> str:
    return f'<img="{file_name}">'


def _files_with_prefix(record: BenchmarkRecord, prefix: str) -> list[str]:
    """Return the names of the question's images (q_) or of the options' (a_)."""
    return [file_name for file_name in record.images if file_name.startswith(prefix)]


def _yi_question_and_options(record: BenchmarkRecord) -> tuple[str, list[str]]:
    """Remove the tags of the question's images and of the options'.

    Where options have the same text, the letters after it shift. The script looks up what the
    right letters then mean, and fails where they mean nothing or the answer is withheld.
    """
    question = record.question
    for file_name in _files_with_prefix(record, "q_"):
        question = question.replace(_image_tag(file_name), "")
    options = _yi_options(record)
    if record.answer is None:
        raise SkippedRecord(
            "its answer is withheld: the reference reads it before it asks, and breaks"
        )
    letters = record.answer if record.type == CMMMU_CHOICE_TYPE else ()
    if not all(has_option(letter, options) for letter in letters):
        known = f"{len(options)} different options"
        raise SkippedRecord(
            f"its answer is {record.answer}, and it has {known}: the reference breaks"
        )
    return question, options


def _yi_options(record: BenchmarkRecord) -> list[str]:
    """Return the options without their images' tags; those with the same text become one.

    The last digit of an image's name is the number of its option. A single image belongs to no
    option, and its tag stays.
    """
    image_of_option = dict.fromkeys(record.options, "")
    files = _files_with_prefix(record, "a_") if record.type == CMMMU_CHOICE_TYPE else []
    for file_name in files if len(files) > 1 else []:
        digit = file_name.split("_")[-1].split(".")[0][-1:]
        if digit not in [str(index + 1) for index in range(len(record.options))]:
            raise SkippedRecord(f"its image {file_name} belongs to no option: the reference breaks")
        image_of_option[record.options[int(digit) - 1]] = file_name
    return [
        text.replace(_image_tag(file_name), "") if file_name else text
        for text, file_name in image_of_option.items()
    ]


def _yi_images(record: BenchmarkRecord, _: str) -> tuple[LazyImage, ...]:
    """Return the question's first image; zeros where the options have two.

    Tags that are left in the options count as images where the question has none.
    """
    question_images = _files_with_prefix(record, "q_")
    option_images = _files_with_prefix(record, "a_")
    if not question_images:
        option_images += [
            file_name
            for option in _yi_options(record)
            for file_name in CMMMU_IMAGE_TAG.findall(option)
        ]
    if len(option_images) <= 1 and not question_images:
        raise SkippedRecord("has no image in its question: the reference leaves it out")
    if question_images and record.type not in TEMPLATES_BY_TYPE:
        raise SkippedRecord(f"its type is {record.type}: the reference leaves it out")
    return (ZeroImage(),) if len(option_images) > 1 else (record.images[question_images[0]],)


def _drop_numbered_tags(_: BenchmarkRecord, text: str) -> str:
    return NUMBERED_TAG.sub("", text)


def _unchanged_parts(record: BenchmarkRecord) -> tuple[str, list[str]]:
    return record.question, list(record.options)


def _number_tags(record: BenchmarkRecord, text: str) -> str:
    """Number the tags in the order of the images in the data."""
    for number, file_name in enumerate(record.images, start=1):
        text = text.replace(_image_tag(file_name), f"<图片 {number}>")
    return text


def _cited_images(record: BenchmarkRecord, text: str) -> tuple[LazyImage, ...]:
    """Return the images that the text cites, in its order, each as often as it is cited."""
    images = {str(number): image for number, image in enumerate(record.images.values(), start=1)}
    for number in NUMBERED_TAG.findall(text):
        if number not in images:
            raise SkippedRecord(
                f"cites image {number}, which it does not have: the reference breaks"
            )
    return tuple(images[number] for number in NUMBERED_TAG.findall(text))


CMMMU_YI = CmmmuPromptProtocol(
    _yi_question_and_options, _drop_numbered_tags, _yi_images, GenerationLimits(64, stop="###")
)
"""01-ai/Yi, VL/llava/eval/01_eval_cmmmu.py of January 2024."""
CMMMU_LMMS = CmmmuPromptProtocol(
    _unchanged_parts, _number_tags, _cited_images, GenerationLimits(16)
)
"""lmms-eval of 2026, tasks cmmmu_val and cmmmu_test."""


PROMPT_PROTOCOLS: Mapping[str, Mapping[str, PromptProtocol]] = {
    "mmmu": {
        "yi": MMMU_YI,
        "official": MMMU_OFFICIAL,
        "lmms": MMMU_LMMS,
        "lmms_test": MMMU_LMMS_TEST,
    },
    "cmmmu": {"yi": CMMMU_YI, "lmms": CMMMU_LMMS},
}
NO_PROMPTS_REASONS = {
    ("cmmmu", "official"): " The benchmark's own code has none: it scores answers, and asks nothing"
}


def prompt_or_skip(record: BenchmarkRecord, protocol_name: str) -> BenchmarkPrompt | SkippedRecord:
    """Return what a protocol asks about a record, or why it does not ask."""
    try:
        return prompt_protocol(record.task, protocol_name).build_prompt(record)
    except SkippedRecord as skipped:
        return skipped


def prompt_protocol(task: str, protocol_name: str) -> PromptProtocol:
    """Return a protocol of a benchmark; raise a UserError for a name that it does not have."""
    if task not in PROMPT_PROTOCOLS:
        allowed = ", ".join(PROMPT_PROTOCOLS)
        raise UserError(
            f"no task '{task}'; there are {allowed}.{suggest_name(task, PROMPT_PROTOCOLS)}"
        )
    known = PROMPT_PROTOCOLS[task]
    if protocol_name not in known:
        reason = NO_PROMPTS_REASONS.get((task, protocol_name), "")
        allowed = ", ".join(known)
        raise UserError(
            f"{task} has no prompts by protocol '{protocol_name}'; there are {allowed}."
            f"{reason or suggest_name(protocol_name, known)}"
        )
    return known[protocol_name]
