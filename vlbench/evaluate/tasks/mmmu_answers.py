"""How MMMU's scorers read a response: a letter, or texts and numbers that answer an open question.

The behaviour is that of MMMU's `eval_utils.py` and, where it says so, of lmms-eval's copy of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlbench.evaluate.tasks.answer_parsing import (
    AnswerValue,
    distinct_values,
    find_numbers,
    has_any_gold,
    number_patterns,
    parse_number,
    strip_punctuation,
    texts_after_cues,
)
from vlbench.evaluate.tasks.scored_items import AnsweredItem, option_letters, require_text

# How a letter stands in a response, and how its place is looked for when several are found.
OFFICIAL_LETTER_FORMS = (("({})", "({})"), (" {} ", " {} "))
LMMS_LETTER_FORMS = (
    ("({})", "({})"),
    ("{} ", " {} "),
    ("{}.", " {} "),
)  # "ABC " finds C, but no place
SHORT_RESPONSE_WORDS = 5  # only a longer response may answer in the words of an option

ANSWER_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
NUMBER_PATTERNS = number_patterns(",", r"\b", r"[,\d]")


def parse_letter_official(item: AnsweredItem) -> str | None:
    """Read a letter as MMMU does; None if there is none."""
    return _last_letter(item, OFFICIAL_LETTER_FORMS)


def parse_letter_lmms(item: AnsweredItem) -> str | None:
    """Read a letter as lmms-eval does, which also takes "B." and any word that ends in a letter."""
    return _last_letter(item, LMMS_LETTER_FORMS)


def _last_letter(item: AnsweredItem, letter_forms: Sequence[tuple[str, str]]) -> str | None:
    """Return the letter that stands last, of those in the first form that is found at all.

    The words of options are looked for when no letter is found. The first of equals wins.
    """
    said = strip_punctuation(require_text(item, item.response, "response"))
    for form, place in letter_forms:
        found = [one for one in option_letters(item.options) if form.format(one) in said]
        if found:
            return max(found, key=lambda one: said.rfind(place.format(one)))
    if len(said.split()) <= SHORT_RESPONSE_WORDS:
        return None
    places = {
        letter: said.lower().rfind(require_text(item, option, f"option {letter}").lower())
        for letter, option in zip(option_letters(item.options), item.options, strict=False)
    }
    latest = max(places, key=places.__getitem__, default=None)
    return latest if latest and places[latest] >= 0 else None


def whole_response(item: AnsweredItem) -> object:
    """Take the response as it is, as MMMU does with answers that are said to be parsed."""
    return item.response


def parse_letter_bare(item: AnsweredItem) -> str:
    """Take a response that is a letter and nothing else; "" for any other."""
    said = require_text(item, item.response, "response")
    return said if len(said) == 1 and said in option_letters(item.options) else ""


def is_correct_letter(prediction: object, item: AnsweredItem) -> bool:
    """Say whether a letter is the right one, or one of them."""
    gold = item.answer
    return prediction in gold if isinstance(gold, list) else prediction == gold


def parse_open_values(item: AnsweredItem) -> list[AnswerValue]:
    """Return what a response to an open question may mean: texts, and the numbers in them.

    Capitals are gone before the text is divided at ". A", so only ends of lines divide it. A tuple
    holds what MMMU's own code has read already.
    """
    if isinstance(item.response, tuple):
        return list(item.response)
    said = require_text(item, item.response, "response").strip().strip(".").lower()
    found = texts_after_cues(said, said.split("\n"), ANSWER_CUES, last_part_cues=("=",))
    written = [*found, *find_numbers(found, NUMBER_PATTERNS)]
    return distinct_values(value for one in written for value in normalize_answer(one))


def has_correct_answer(prediction: Sequence[AnswerValue], item: AnsweredItem) -> bool:
    """Say whether a predicted text has a right answer in it, or a predicted number is one."""
    return has_any_gold(prediction, normalized_golds(item))


def parse_open_lmms(item: AnsweredItem) -> str:
    """Return the first of the values, as text: what lmms-eval keeps of them.

    Which comes first depends on hashes there; the verdict does not.
    """
    return str(next(iter(parse_open_values(item)), ""))


def has_correct_answer_lmms(prediction: str, item: AnsweredItem) -> bool:
    """Look for a right answer in the single characters of the text, as lmms-eval does.

    It takes the text for the list that it was before, so that only an empty answer is found.
    """
    return has_any_gold(list(prediction), normalized_golds(item))


def parse_open_bare(item: AnsweredItem) -> list[AnswerValue]:
    """Return the response, normalised and as a whole; what was read already as it is."""
    if isinstance(item.response, tuple):
        return list(item.response)
    return normalize_answer(require_text(item, item.response, "response"))


def is_correct_value(prediction: Sequence[AnswerValue], item: AnsweredItem) -> bool:
    """Say whether the response is a right answer, apart from case and decimals."""
    return any(value in normalized_golds(item) for value in prediction)


def normalized_golds(item: AnsweredItem) -> list[AnswerValue]:
    """Return the right answers of an open question, normalised."""
    several = item.answer if isinstance(item.answer, list) else [item.answer]
    return [
        value for one in several for value in normalize_answer(require_text(item, one, "answer"))
    ]


def normalize_answer(written: str) -> list[AnswerValue]:
    """Return a text as a number, or in small letters; a single letter with a space at each side.

    "a" would be found in nearly every text, " a" and "a " are not.
    """
    written = written.strip()
    value = parse_number(written)
    if value is not None:
        return [value]
    written = written.lower()
    return [f" {written}", f"{written} "] if len(written) == 1 else [written]
