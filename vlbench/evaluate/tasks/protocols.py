"""Protocols: who reads the answers of a benchmark, and how. Another one is another entry here."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlbench.evaluate.tasks import cmmmu_answers as cmmmu
from vlbench.evaluate.tasks import mmmu_answers as mmmu
from vlbench.evaluate.tasks.items import Item, Scored, letters
from vlbench.mistakes import Mistake, nearest


@dataclass(frozen=True)
class Rule:
    """How one type of question is scored.

    `read` returns None where the benchmarks' own code draws one of `choices`, and "" for a
    response that is simply wrong.
    """

    read: Callable[[Item], Any]
    agrees: Callable[[Any, Item], bool]
    choices: Callable[[Item], Sequence[str]] = lambda item: ""


@dataclass(frozen=True)
class Protocol:
    """The rules of every type of question, whether unreadable answers are drawn, and `shown`.

    `shown` is the format in which the code that is followed prints accuracies.
    """

    rules: Mapping[str, Rule]
    draws: bool
    shown: str


def _mmmu(choice: Rule, question: Rule) -> dict[str, Rule]:
    return {"multiple-choice": choice, "open": question, "short-answer": question}


def _cmmmu(choice: Rule, truth: Rule, gap: Rule) -> dict[str, Rule]:
    return {"选择": choice, "判断": truth, "填空": gap}


LETTER = Rule(mmmu.official_letter, mmmu.is_letter, lambda item: letters(item.options))
OPEN = Rule(mmmu.open_values, mmmu.is_open)
MMMU = Protocol(_mmmu(LETTER, OPEN), draws=True, shown=".3f")

LETTERS = Rule(cmmmu.official_letters, cmmmu.is_same, lambda item: cmmmu.LETTERS)
TRUTH = Rule(cmmmu.official_truth, cmmmu.is_same, lambda item: (cmmmu.RIGHT, cmmmu.WRONG))
GAP = Rule(cmmmu.gap_values, cmmmu.is_gap)
CMMMU = Protocol(_cmmmu(LETTERS, TRUTH, GAP), draws=True, shown="g")

# official: the benchmarks' own code. lmms: lmms-eval of August 2026. strict: official, but an
# answer that cannot be read is wrong, and what is denied is 错. raw: the answer and not a word
# more. yi: what the code that came with Yi-VL leads to; for MMMU a letter as it is.
PROTOCOLS: dict[str, dict[str, Protocol]] = {
    "mmmu": {
        "official": MMMU,
        "lmms": Protocol(
            _mmmu(replace(LETTER, read=mmmu.lmms_letter), Rule(mmmu.lmms_open, mmmu.lmms_is_open)),
            draws=True,
            shown=".5f",
        ),
        "strict": replace(MMMU, draws=False),
        "raw": Protocol(
            _mmmu(Rule(mmmu.bare_letter, mmmu.is_letter), Rule(mmmu.bare_value, mmmu.is_value)),
            draws=False,
            shown=".3f",
        ),
        "yi": Protocol(
            _mmmu(Rule(mmmu.whole_response, mmmu.is_letter), OPEN), draws=False, shown=".3f"
        ),
    },
    "cmmmu": {
        "official": CMMMU,
        "lmms": Protocol(
            _cmmmu(replace(LETTERS, read=cmmmu.lmms_letters), TRUTH, GAP), draws=True, shown=".3f"
        ),
        "strict": Protocol(
            _cmmmu(LETTERS, replace(TRUTH, read=cmmmu.strict_truth), GAP), draws=False, shown="g"
        ),
        "raw": Protocol(
            _cmmmu(
                Rule(cmmmu.bare_letters, cmmmu.is_same),
                Rule(cmmmu.bare_truth, cmmmu.is_same),
                Rule(cmmmu.bare_gap, cmmmu.is_value),
            ),
            draws=False,
            shown="g",
        ),
        "yi": CMMMU,
    },
}


def protocol_of(task: str, protocol: str) -> Protocol:
    """Return a protocol of a task by their names; a Mistake if there is none."""
    for what, name, known in (
        ("task", task, PROTOCOLS),
        ("protocol", protocol, PROTOCOLS.get(task, {})),
    ):
        if name not in known:
            allowed = ", ".join(known)
            raise Mistake(f"{what} is '{name}'; known are {allowed}.{nearest(name, known)}")
    return PROTOCOLS[task][protocol]


def score_all(task: str, protocol: str, items: Iterable[Item], seed: int = 42) -> list[Scored]:
    """Score answers in their order, which matters where unreadable ones are drawn at random.

    Draws come from one stream, seeded once (42 in the benchmarks' code), one for each answer that
    cannot be read. A Mistake names, a line each, all the items at which that code would stop.
    """
    chosen = protocol_of(task, protocol)
    stream = random.Random(seed)
    scored, mistakes = [], []
    for item in items:
        rule = chosen.rules[item.type]
        try:
            prediction = rule.read(item)
            drawn = chosen.draws and prediction is None
            if drawn:
                prediction = stream.choice(rule.choices(item))
            correct = prediction is not None and rule.agrees(prediction, item)
            scored.append(Scored(item, None if prediction == "" else prediction, correct, drawn))
        except Mistake as mistake:
            mistakes.append(str(mistake))
    if mistakes:
        raise Mistake("\n".join(mistakes))
    return scored
