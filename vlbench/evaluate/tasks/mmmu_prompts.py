"""How scripts that evaluate on MMMU ask its questions: text and pictures of each protocol."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from vlbench.data.image_processing import ZeroImage
from vlbench.data.sample import LazyImage
from vlbench.evaluate.tasks.benchmark_types import (
    BenchmarkPrompt,
    BenchmarkRecord,
    GenerationLimits,
    SkippedRecord,
    has_option,
)

IMAGE_TAG = re.compile(r"<image (\d+)>")
CHOICE_TYPE = "multiple-choice"  # every other type is an open question
FIRST_IMAGE = "image_1"


@dataclass(frozen=True)
class MmmuPromptProtocol:
    """A way to ask MMMU's questions."""

    option_template: str
    """One line of `{options}`: `{letter}` and `{text}`; tags in options always stay."""
    choice_template: str
    """Text of a multiple-choice question: `{question}` and `{options}`."""
    open_template: str
    """Text of any other: `{question}`."""
    keeps_tags: bool
    """Whether the tags of pictures stay in the question."""
    select_images: Callable[[BenchmarkRecord], tuple[LazyImage, ...]]
    """What is shown; raises Skipped."""
    needs_answer: bool
    """Whether the script looks up the option of the right letter, and breaks where none is."""
    generation_limits: GenerationLimits


def build_prompt(record: BenchmarkRecord, protocol: MmmuPromptProtocol) -> BenchmarkPrompt:
    """Return the prompt of a record, or raise Skipped."""
    if protocol.needs_answer:
        _check_answer(record)
    pictures = protocol.select_images(record)
    question = record.question if protocol.keeps_tags else IMAGE_TAG.sub("", record.question)
    options = "".join(
        protocol.option_template.format(letter=chr(ord("A") + number), text=text)
        for number, text in enumerate(record.options)
    )
    template = protocol.choice_template if record.type == CHOICE_TYPE else protocol.open_template
    return BenchmarkPrompt(template.format(question=question, options=options), pictures)


def _check_answer(record: BenchmarkRecord) -> None:
    if record.type != CHOICE_TYPE or record.answer is None:
        return  # withheld as "?", which the scripts take without complaint
    if not isinstance(record.answer, str) or not has_option(record.answer, record.options):
        known = f"its {len(record.options)} options"
        raise SkippedRecord(
            f"its answer is {record.answer!r}, none of {known}: the reference breaks"
        )


def _first_image_or_zero(record: BenchmarkRecord) -> tuple[LazyImage, ...]:
    """Show image_1, whatever is cited; zeros where it is missing or options cite two pictures.

    Yi's script counts tags of options twice where the question has none, so there one is enough.
    """
    cited = sum(len(IMAGE_TAG.findall(option)) for option in record.options)
    if not IMAGE_TAG.search(record.question):
        cited *= 2
    return (ZeroImage() if cited > 1 else record.images.get(FIRST_IMAGE, ZeroImage()),)


def _first_image(record: BenchmarkRecord) -> tuple[LazyImage, ...]:
    """Show image_1, whatever is cited."""
    if FIRST_IMAGE not in record.images:
        raise SkippedRecord("has no image_1: the reference draws a letter and does not ask")
    return (record.images[FIRST_IMAGE],)


def _cited_images(record: BenchmarkRecord) -> tuple[LazyImage, ...]:
    """Show every picture that is cited once, sorted by the name of its column."""
    shown = (record.question, *(record.options if record.type == CHOICE_TYPE else ()))
    columns = sorted({f"image_{number}" for text in shown for number in IMAGE_TAG.findall(text)})
    for column in columns:
        if column not in record.images:
            raise SkippedRecord(f"cites {column}, which it does not have: the reference breaks")
    return tuple(record.images[column] for column in columns)


LETTER_INSTRUCTION = "Answer with the option's letter from the given choices directly."
PHRASE_INSTRUCTION = "Answer the question using a single word or phrase."
YI_PROTOCOL = MmmuPromptProtocol(
    option_template="{letter}. {text}\n",
    choice_template=f"{{question}}\n{{options}}\n{LETTER_INSTRUCTION}",
    open_template=f"{{question}}\n{PHRASE_INSTRUCTION}",
    keeps_tags=False,
    select_images=_first_image_or_zero,
    needs_answer=True,
    generation_limits=GenerationLimits(max_new_tokens=64, stop="###"),
)
"""01-ai/Yi, VL/llava/eval/01_eval_mmmu.py of January 2024."""
OFFICIAL_PROTOCOL = replace(
    YI_PROTOCOL,
    option_template="({letter}) {text}\n",
    keeps_tags=True,
    select_images=_first_image,
    generation_limits=GenerationLimits(
        128, reference_difference="the reference samples at temperature 1, over 5 beams"
    ),
)
"""MMMU-Benchmark/MMMU, run_llava.py."""
LMMS_PROTOCOL = MmmuPromptProtocol(
    option_template="{letter}. {text}\n",
    choice_template=f"{{question}}\n{{options}}\n{LETTER_INSTRUCTION}",
    open_template=f"{{question}}\n\n{PHRASE_INSTRUCTION}",
    keeps_tags=True,
    select_images=_cited_images,
    needs_answer=False,
    generation_limits=GenerationLimits(max_new_tokens=128),
)
"""lmms-eval of 2026, task mmmu_val, for models that take text and pictures apart."""
LMMS_TEST_PROTOCOL = replace(
    LMMS_PROTOCOL,
    choice_template="{question}\n{options}\n",
    open_template="{question}\n\n",
    generation_limits=GenerationLimits(max_new_tokens=512),
)
"""The same, task mmmu_test: it gives no instruction."""
PROMPT_PROTOCOLS = {
    "yi": YI_PROTOCOL,
    "official": OFFICIAL_PROTOCOL,
    "lmms": LMMS_PROTOCOL,
    "lmms_test": LMMS_TEST_PROTOCOL,
}
