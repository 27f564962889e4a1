"""How MMMU's scorers read a response: a letter, or texts and numbers that answer an open question.

The behaviour is that of MMMU's `eval_utils.py` and, where it says so, of lmms-eval's copy of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlbench.evaluate.tasks.items import Item, letters, text
from vlbench.evaluate.tasks.reading import (
    Value,
    bare,
    distinct,
    holds,
    number,
    number_forms,
    numbers,
    tails,
)

# How a letter stands in a response, and how its place is looked for when several are found.
OFFICIAL = (("({})", "({})"), (" {} ", " {} "))
LMMS = (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} "))  # "ABC " finds C, but no place
WORDS = 5  # only a longer response may answer in the words of an option

CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
FORMS = number_forms(",", r"\b", r"[,\d]")


def official_letter(item: Item) -> str | None:
    """Read a letter as MMMU does; None if there is none."""
    return _letter(item, OFFICIAL)


def lmms_letter(item: Item) -> str | None:
    """Read a letter as lmms-eval does, which also takes "B." and any word that ends in a letter."""
    return _letter(item, LMMS)


def _letter(item: Item, marks: Sequence[tuple[str, str]]) -> str | None:
    """Return the letter that stands last, of those in the first form that is found at all.

    The words of options are looked for when no letter is found. The first of equals wins.
    """
    said = bare(text(item, item.response, "response"))
    for form, place in marks:
        found = [one for one in letters(item.options) if form.format(one) in said]
        if found:
            return max(found, key=lambda one: said.rfind(place.format(one)))
    if len(said.split()) <= WORDS:
        return None
    places = {
        letter: said.lower().rfind(text(item, option, f"option {letter}").lower())
        for letter, option in zip(letters(item.options), item.options, strict=False)
    }
    latest = max(places, key=places.__getitem__, default=None)
    return latest if latest and places[latest] >= 0 else None


def whole_response(item: Item) -> object:
    """Take the response as it is, as MMMU does with answers that are said to be parsed."""
    return item.response


def bare_letter(item: Item) -> str:
    """Take a response that is a letter and nothing else; "" for any other."""
    said = text(item, item.response, "response")
    return said if len(said) == 1 and said in letters(item.options) else ""


def is_letter(prediction: object, item: Item) -> bool:
    """Say whether a letter is the right one, or one of them."""
    gold = item.answer
    return prediction in gold if isinstance(gold, list) else prediction == gold


def open_values(item: Item) -> list[Value]:
    """Return what a response to an open question may mean: texts, and the numbers in them.

    Capitals are gone before the text is divided at ". A", so only ends of lines divide it. A tuple
    holds what MMMU's own code has read already.
    """
    if isinstance(item.response, tuple):
        return list(item.response)
    said = text(item, item.response, "response").strip().strip(".").lower()
    found = tails(said, said.split("\n"), CUES, last=("=",))
    written = [*found, *numbers(found, FORMS)]
    return distinct(value for one in written for value in normal(one))


def is_open(prediction: Sequence[Value], item: Item) -> bool:
    """Say whether a predicted text has a right answer in it, or a predicted number is one."""
    return holds(prediction, golds(item))


def lmms_open(item: Item) -> str:
    """Return the first of the values, as text: what lmms-eval keeps of them.

    Which comes first depends on hashes there; the verdict does not.
    """
    return str(next(iter(open_values(item)), ""))


def lmms_is_open(prediction: str, item: Item) -> bool:
    """Look for a right answer in the single characters of the text, as lmms-eval does.

    It takes the text for the list that it was before, so that only an empty answer is found.
    """
    return holds(list(prediction), golds(item))


def bare_value(item: Item) -> list[Value]:
    """Return the response, normalised and as a whole; what was read already as it is."""
    if isinstance(item.response, tuple):
        return list(item.response)
    return normal(text(item, item.response, "response"))


def is_value(prediction: Sequence[Value], item: Item) -> bool:
    """Say whether the response is a right answer, apart from case and decimals."""
    return any(value in golds(item) for value in prediction)


def golds(item: Item) -> list[Value]:
    """Return the right answers of an open question, normalised."""
    several = item.answer if isinstance(item.answer, list) else [item.answer]
    return [value for one in several for value in normal(text(item, one, "answer"))]


def normal(written: str) -> list[Value]:
    """Return a text as a number, or in small letters; a single letter with a space at each side.

    "a" would be found in nearly every text, " a" and "a " are not.
    """
    written = written.strip()
    value = number(written)
    if value is not None:
        return [value]
    written = written.lower()
    return [f" {written}", f"{written} "] if len(written) == 1 else [written]
