"""Protocols: who reads the answers of a benchmark, and how. Another one is another entry here."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlbench.errors import UserError, suggest_name
from vlbench.evaluate.tasks import cmmmu_answers as cmmmu
from vlbench.evaluate.tasks import mmmu_answers as mmmu
from vlbench.evaluate.tasks.scored_items import AnsweredItem, ScoredItem, option_letters


@dataclass(frozen=True)
class ScoringRule:
    """How one type of question is scored.

    `read` returns None where the benchmarks' own code draws one of `choices`, and "" for a
    response that is simply wrong.
    """

    parse_response: Callable[[AnsweredItem], Any]
    is_correct: Callable[[Any, AnsweredItem], bool]
    random_choices: Callable[[AnsweredItem], Sequence[str]] = lambda item: ""


@dataclass(frozen=True)
class ScoringProtocol:
    """The rules of every type of question, whether unreadable answers are drawn, and `shown`.

    `shown` is the format in which the code that is followed prints accuracies.
    """

    rules: Mapping[str, ScoringRule]
    random_fallback: bool
    accuracy_format: str


def _mmmu_rules(choice_rule: ScoringRule, open_rule: ScoringRule) -> dict[str, ScoringRule]:
    return {"multiple-choice": choice_rule, "open": open_rule, "short-answer": open_rule}


def _cmmmu_rules(
    choice_rule: ScoringRule, judgement_rule: ScoringRule, gap_rule: ScoringRule
) -> dict[str, ScoringRule]:
    return {"选择": choice_rule, "判断": judgement_rule, "填空": gap_rule}


LETTER_RULE = ScoringRule(
    mmmu.parse_letter_official, mmmu.is_correct_letter, lambda item: option_letters(item.options)
)
OPEN_RULE = ScoringRule(mmmu.parse_open_values, mmmu.has_correct_answer)
MMMU_OFFICIAL = ScoringProtocol(
    _mmmu_rules(LETTER_RULE, OPEN_RULE), random_fallback=True, accuracy_format=".3f"
)

LETTERS_RULE = ScoringRule(
    cmmmu.parse_letters_official, cmmmu.is_exact_answer, lambda item: cmmmu.OPTION_LETTERS
)
JUDGEMENT_RULE = ScoringRule(
    cmmmu.parse_judgement_official,
    cmmmu.is_exact_answer,
    lambda item: (cmmmu.TRUE_ANSWER, cmmmu.FALSE_ANSWER),
)
GAP_RULE = ScoringRule(cmmmu.parse_gap_values, cmmmu.has_correct_answer)
CMMMU_OFFICIAL = ScoringProtocol(
    _cmmmu_rules(LETTERS_RULE, JUDGEMENT_RULE, GAP_RULE), random_fallback=True, accuracy_format="g"
)

# official: the benchmarks' own code. lmms: lmms-eval of August 2026. strict: official, but an
# answer that cannot be read is wrong, and what is denied is 错. raw: the answer and not a word
# more. yi: what the code that came with Yi-VL leads to; for MMMU a letter as it is.
SCORING_PROTOCOLS: dict[str, dict[str, ScoringProtocol]] = {
    "mmmu": {
        "official": MMMU_OFFICIAL,
        "lmms": ScoringProtocol(
            _mmmu_rules(
                replace(LETTER_RULE, parse_response=mmmu.parse_letter_lmms),
                ScoringRule(mmmu.parse_open_lmms, mmmu.has_correct_answer_lmms),
            ),
            random_fallback=True,
            accuracy_format=".5f",
        ),
        "strict": replace(MMMU_OFFICIAL, random_fallback=False),
        "raw": ScoringProtocol(
            _mmmu_rules(
                ScoringRule(mmmu.parse_letter_bare, mmmu.is_correct_letter),
                ScoringRule(mmmu.parse_open_bare, mmmu.is_correct_value),
            ),
            random_fallback=False,
            accuracy_format=".3f",
        ),
        "yi": ScoringProtocol(
            _mmmu_rules(ScoringRule(mmmu.whole_response, mmmu.is_correct_letter), OPEN_RULE),
            random_fallback=False,
            accuracy_format=".3f",
        ),
    },
    "cmmmu": {
        "official": CMMMU_OFFICIAL,
        "lmms": ScoringProtocol(
            _cmmmu_rules(
                replace(LETTERS_RULE, parse_response=cmmmu.parse_letters_lmms),
                JUDGEMENT_RULE,
                GAP_RULE,
            ),
            random_fallback=True,
            accuracy_format=".3f",
        ),
        "strict": ScoringProtocol(
            _cmmmu_rules(
                LETTERS_RULE,
                replace(JUDGEMENT_RULE, parse_response=cmmmu.parse_judgement_strict),
                GAP_RULE,
            ),
            random_fallback=False,
            accuracy_format="g",
        ),
        "raw": ScoringProtocol(
            _cmmmu_rules(
                ScoringRule(cmmmu.parse_letters_bare, cmmmu.is_exact_answer),
                ScoringRule(cmmmu.parse_judgement_bare, cmmmu.is_exact_answer),
                ScoringRule(cmmmu.parse_gap_bare, cmmmu.is_correct_value),
            ),
            random_fallback=False,
            accuracy_format="g",
        ),
        "yi": CMMMU_OFFICIAL,
    },
}


def scoring_protocol(task: str, protocol: str) -> ScoringProtocol:
    """Return a protocol of a task by their names; a Mistake if there is none."""
    for what, name, known in (
        ("task", task, SCORING_PROTOCOLS),
        ("protocol", protocol, SCORING_PROTOCOLS.get(task, {})),
    ):
        if name not in known:
            allowed = ", ".join(known)
            raise UserError(f"{what} is '{name}'; known are {allowed}.{suggest_name(name, known)}")
    return SCORING_PROTOCOLS[task][protocol]


def score_items(
    task: str, protocol: str, items: Iterable[AnsweredItem], seed: int = 42
) -> list[ScoredItem]:
    """Score answers in their order, which matters where unreadable ones are drawn at random.

    Draws come from one stream, seeded once (42 in the benchmarks' code), one for each answer that
    cannot be read. A Mistake names, a line each, all the items at which that code would stop.
    """
    chosen = scoring_protocol(task, protocol)
    stream = random.Random(seed)
    scored, mistakes = [], []
    for item in items:
        rule = chosen.rules[item.type]
        try:
            prediction = rule.parse_response(item)
            drawn = chosen.random_fallback and prediction is None
            if drawn:
                prediction = stream.choice(rule.random_choices(item))
            correct = prediction is not None and rule.is_correct(prediction, item)
            scored.append(
                ScoredItem(item, None if prediction == "" else prediction, correct, drawn)
            )
        except UserError as mistake:
            mistakes.append(str(mistake))
    if mistakes:
        raise UserError("\n".join(mistakes))
    return scored
