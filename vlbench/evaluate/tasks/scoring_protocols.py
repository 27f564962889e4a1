"""Scoring protocols: how the answers to each type of question are parsed and judged."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlbench.errors import UserError, suggest_name
from vlbench.evaluate.tasks import answer_parsing as parsing
from vlbench.evaluate.tasks.benchmark_types import (
    CMMMU_CHOICE_TYPE,
    CMMMU_FILL_IN_TYPE,
    CMMMU_JUDGEMENT_TYPE,
    MMMU_CHOICE_TYPE,
    AnsweredItem,
    ScoredItem,
    option_letters,
)

DEFAULT_SEED = 42  # of the benchmarks' own code


@dataclass(frozen=True)
class ScoringRule:
    """How one type of question is scored.

    `parse_response` returns None where the benchmarks' own code draws one of `random_choices`, and
    "" for a response that is simply wrong.
    """

    parse_response: Callable[[AnsweredItem], Any]
    is_correct: Callable[[Any, AnsweredItem], bool]
    random_choices: Callable[[AnsweredItem], Sequence[str]] = lambda item: ""


@dataclass(frozen=True)
class ScoringProtocol:
    """The rules of a benchmark, and how its code reports accuracies."""

    rules: Mapping[str, ScoringRule]
    """By type of question."""
    random_fallback: bool
    """Whether an answer that cannot be parsed is drawn at random."""
    accuracy_format: str
    """The format in which the reference code prints accuracies."""


def _mmmu_rules(choice_rule: ScoringRule, open_rule: ScoringRule) -> dict[str, ScoringRule]:
    return {MMMU_CHOICE_TYPE: choice_rule, "open": open_rule, "short-answer": open_rule}


def _cmmmu_rules(
    choice_rule: ScoringRule, judgement_rule: ScoringRule, fill_in_rule: ScoringRule
) -> dict[str, ScoringRule]:
    return {
        CMMMU_CHOICE_TYPE: choice_rule,
        CMMMU_JUDGEMENT_TYPE: judgement_rule,
        CMMMU_FILL_IN_TYPE: fill_in_rule,
    }


LETTER_RULE = ScoringRule(
    parsing.parse_letter_official,
    parsing.is_correct_letter,
    lambda item: option_letters(item.options),
)
OPEN_RULE = ScoringRule(parsing.parse_open_values, parsing.is_correct_open)
MMMU_OFFICIAL = ScoringProtocol(
    _mmmu_rules(LETTER_RULE, OPEN_RULE), random_fallback=True, accuracy_format=".3f"
)

LETTERS_RULE = ScoringRule(
    parsing.parse_letters_official, parsing.is_exact_answer, lambda item: parsing.CMMMU_LETTERS
)
JUDGEMENT_RULE = ScoringRule(
    parsing.parse_judgement_official,
    parsing.is_exact_answer,
    lambda item: (parsing.TRUE_ANSWER, parsing.FALSE_ANSWER),
)
FILL_IN_RULE = ScoringRule(parsing.parse_fill_in_values, parsing.is_correct_fill_in)
CMMMU_OFFICIAL = ScoringProtocol(
    _cmmmu_rules(LETTERS_RULE, JUDGEMENT_RULE, FILL_IN_RULE),
    random_fallback=True,
    accuracy_format="g",
)

# official: the benchmarks' own code. lmms: lmms-eval of August 2026. strict: official, but an
# answer that cannot be parsed is wrong, and a denial is 错. raw: the answer and not a word more.
# yi: what the code that came with Yi-VL leads to; for MMMU it compares the response as it is.
SCORING_PROTOCOLS: dict[str, dict[str, ScoringProtocol]] = {
    "mmmu": {
        "official": MMMU_OFFICIAL,
        "lmms": ScoringProtocol(
            _mmmu_rules(
                replace(LETTER_RULE, parse_response=parsing.parse_letter_lmms),
                ScoringRule(parsing.parse_open_lmms, parsing.is_correct_open_lmms),
            ),
            random_fallback=True,
            accuracy_format=".5f",
        ),
        "strict": replace(MMMU_OFFICIAL, random_fallback=False),
        "raw": ScoringProtocol(
            _mmmu_rules(
                ScoringRule(parsing.parse_letter_raw, parsing.is_correct_letter),
                ScoringRule(parsing.parse_open_raw, parsing.is_correct_open_raw),
            ),
            random_fallback=False,
            accuracy_format=".3f",
        ),
        "yi": ScoringProtocol(
            _mmmu_rules(ScoringRule(parsing.whole_response, parsing.is_correct_letter), OPEN_RULE),
            random_fallback=False,
            accuracy_format=".3f",
        ),
    },
    "cmmmu": {
        "official": CMMMU_OFFICIAL,
        "lmms": ScoringProtocol(
            _cmmmu_rules(
                replace(LETTERS_RULE, parse_response=parsing.parse_letters_lmms),
                JUDGEMENT_RULE,
                FILL_IN_RULE,
            ),
            random_fallback=True,
            accuracy_format=".3f",
        ),
        "strict": ScoringProtocol(
            _cmmmu_rules(
                LETTERS_RULE,
                replace(JUDGEMENT_RULE, parse_response=parsing.parse_judgement_strict),
                FILL_IN_RULE,
            ),
            random_fallback=False,
            accuracy_format="g",
        ),
        "raw": ScoringProtocol(
            _cmmmu_rules(
                ScoringRule(parsing.parse_letters_raw, parsing.is_exact_answer),
                ScoringRule(parsing.parse_judgement_raw, parsing.is_exact_answer),
                ScoringRule(parsing.parse_fill_in_raw, parsing.is_correct_fill_in_raw),
            ),
            random_fallback=False,
            accuracy_format="g",
        ),
        "yi": CMMMU_OFFICIAL,
    },
}


def scoring_protocol(task: str, protocol_name: str) -> ScoringProtocol:
    """Return a protocol of a task by their names; raise a UserError if there is none."""
    for kind, name, known in (
        ("task", task, SCORING_PROTOCOLS),
        ("protocol", protocol_name, SCORING_PROTOCOLS.get(task, {})),
    ):
        if name not in known:
            allowed = ", ".join(known)
            raise UserError(f"{kind} is '{name}'; known are {allowed}.{suggest_name(name, known)}")
    return SCORING_PROTOCOLS[task][protocol_name]


def unknown_type_error(task: str, question_type: object, protocol: ScoringProtocol) -> str:
    """Return what is wrong with a type of question that a protocol has no rule for, or ""."""
    known = protocol.rules
    if isinstance(question_type, str) and question_type in known:
        return ""
    near = suggest_name(str(question_type), known)
    return f"type is '{question_type}'; {task} has {', '.join(known)}.{near}"


def unscorable_reason(task: str, protocol_name: str, item: AnsweredItem) -> str:
    """Return why a protocol cannot score any answer to a question, "" if it can."""
    protocol = scoring_protocol(task, protocol_name)
    if error := unknown_type_error(task, item.type, protocol):
        return f"its {error}"
    is_choice = item.type in (MMMU_CHOICE_TYPE, CMMMU_CHOICE_TYPE)
    may_draw = is_choice and protocol.random_fallback
    if may_draw and not protocol.rules[item.type].random_choices(item):
        return "it has no options, of which an answer that cannot be parsed is drawn"
    return ""


def score_items(
    task: str, protocol_name: str, items: Iterable[AnsweredItem], seed: int = DEFAULT_SEED
) -> list[ScoredItem]:
    """Score answers in their order, which matters where unparsed ones are drawn at random.

    Draws come from one generator, seeded once (42 in the benchmarks' code), one for each answer
    that cannot be parsed. A UserError names, a line each, all items on which the reference fails.
    """
    protocol = scoring_protocol(task, protocol_name)
    generator = random.Random(seed)
    scored, errors = [], []
    for item in items:
        rule = protocol.rules[item.type]
        try:
            prediction = rule.parse_response(item)
            drawn = protocol.random_fallback and prediction is None
            if drawn:
                prediction = generator.choice(rule.random_choices(item))
            correct = prediction is not None and rule.is_correct(prediction, item)
            scored.append(
                ScoredItem(item, None if prediction == "" else prediction, correct, drawn)
            )
        except UserError as error:
            errors.append(str(error))
    if errors:
        raise UserError(*errors)
    return scored
