"""How scripts that evaluate on MMMU ask its questions: text and pictures of each protocol."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from vlbench.data.images import Zero
from vlbench.data.sample import Picture
from vlbench.evaluate.tasks.record import Generation, Prompt, Record, Skipped, has_option

TAG = re.compile(r"<image (\d+)>")
CHOICE = "multiple-choice"  # every other type is an open question
FIRST = "image_1"


@dataclass(frozen=True)
class MmmuProtocol:
    """A way to ask MMMU's questions."""

    option: str
    """One line of `{options}`: `{letter}` and `{text}`; tags in options always stay."""
    choice: str
    """Text of a multiple-choice question: `{question}` and `{options}`."""
    open: str
    """Text of any other: `{question}`."""
    tags: bool
    """Whether the tags of pictures stay in the question."""
    pictures: Callable[[Record], tuple[Picture, ...]]
    """What is shown; raises Skipped."""
    reads_answer: bool
    """Whether the script looks up the option of the right letter, and breaks where none is."""
    generation: Generation


def ask(record: Record, protocol: MmmuProtocol) -> Prompt:
    """Return the prompt of a record, or raise Skipped."""
    if protocol.reads_answer:
        _check_answer(record)
    pictures = protocol.pictures(record)
    question = record.question if protocol.tags else TAG.sub("", record.question)
    options = "".join(
        protocol.option.format(letter=chr(ord("A") + number), text=text)
        for number, text in enumerate(record.options)
    )
    template = protocol.choice if record.type == CHOICE else protocol.open
    return Prompt(template.format(question=question, options=options), pictures)


def _check_answer(record: Record) -> None:
    if record.type != CHOICE or record.answer is None:
        return  # withheld as "?", which the scripts take without complaint
    if not isinstance(record.answer, str) or not has_option(record.answer, record.options):
        known = f"its {len(record.options)} options"
        raise Skipped(f"its answer is {record.answer!r}, none of {known}: the reference breaks")


def _first_or_zero(record: Record) -> tuple[Picture, ...]:
    """Show image_1, whatever is cited; zeros where it is missing or options cite two pictures.

    Yi's script counts tags of options twice where the question has none, so there one is enough.
    """
    cited = sum(len(TAG.findall(option)) for option in record.options)
    if not TAG.search(record.question):
        cited *= 2
    return (Zero() if cited > 1 else record.pictures.get(FIRST, Zero()),)


def _first(record: Record) -> tuple[Picture, ...]:
    """Show image_1, whatever is cited."""
    if FIRST not in record.pictures:
        raise Skipped("has no image_1: the reference draws a letter and does not ask")
    return (record.pictures[FIRST],)


def _cited(record: Record) -> tuple[Picture, ...]:
    """Show every picture that is cited once, sorted by the name of its column."""
    shown = (record.question, *(record.options if record.type == CHOICE else ()))
    columns = sorted({f"image_{number}" for text in shown for number in TAG.findall(text)})
    for column in columns:
        if column not in record.pictures:
            raise Skipped(f"cites {column}, which it does not have: the reference breaks")
    return tuple(record.pictures[column] for column in columns)


LETTER = "Answer with the option's letter from the given choices directly."
PHRASE = "Answer the question using a single word or phrase."
YI = MmmuProtocol(
    option="{letter}. {text}\n",
    choice=f"{{question}}\n{{options}}\n{LETTER}",
    open=f"{{question}}\n{PHRASE}",
    tags=False,
    pictures=_first_or_zero,
    reads_answer=True,
    generation=Generation(max_new_tokens=64, stop="###"),
)
"""01-ai/Yi, VL/llava/eval/01_eval_mmmu.py of January 2024."""
OFFICIAL = replace(
    YI,
    option="({letter}) {text}\n",
    tags=True,
    pictures=_first,
    generation=Generation(128, differs="the reference samples at temperature 1, over 5 beams"),
)
"""MMMU-Benchmark/MMMU, run_llava.py."""
LMMS = MmmuProtocol(
    option="{letter}. {text}\n",
    choice=f"{{question}}\n{{options}}\n{LETTER}",
    open=f"{{question}}\n\n{PHRASE}",
    tags=True,
    pictures=_cited,
    reads_answer=False,
    generation=Generation(max_new_tokens=128),
)
"""lmms-eval of 2026, task mmmu_val, for models that take text and pictures apart."""
LMMS_TEST = replace(
    LMMS,
    choice="{question}\n{options}\n",
    open="{question}\n\n",
    generation=Generation(max_new_tokens=512),
)
"""The same, task mmmu_test: it gives no instruction."""
PROTOCOLS = {"yi": YI, "official": OFFICIAL, "lmms": LMMS, "lmms_test": LMMS_TEST}
