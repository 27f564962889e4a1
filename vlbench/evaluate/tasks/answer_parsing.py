"""How answers to MMMU and CMMMU are parsed from a model's responses, and compared with the truth.

First what the two benchmarks have in common, then MMMU (letters, open questions), then CMMMU
(letters 选择, true or false 判断, fill in the blank 填空). The behaviour is that of the benchmarks'
own `eval_utils.py` and, where a name has `lmms`, of lmms-eval's copy of it. `raw` takes a response
that is the answer and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from vlbench.evaluate.tasks.benchmark_types import AnsweredItem, option_letters, require_text

AnswerValue = str | float

PUNCTUATION = (",", ".", "!", "?", ";", ":", "'")  # in the order in which both scorers strip it


def strip_punctuation(response: str) -> str:
    """Return the response without punctuation at its ends, between single spaces.

    One mark after the other, each once: "B.!" becomes " B. ".
    """
    for mark in PUNCTUATION:
        response = response.strip(mark)
    return f" {response} "


def texts_after_cues(
    response: str, parts: Sequence[str], cues: Sequence[str], last_part_cues: Sequence[str] = ()
) -> list[str]:
    """Return of every part the shortest text after a cue; [response] if no part has any.

    The cues `last_part_cues` count in the last part alone. A cue at the end of its part leaves
    nothing, and the next cue's text is taken then, however long; a single punctuation mark is no
    text.
    """
    texts = []
    for number, part in enumerate(parts, 1):
        shortest = ""
        for cue in (*cues, *last_part_cues) if number == len(parts) else cues:
            if cue in part:
                tail = part.split(cue)[-1].strip()
                if not shortest or len(tail) < len(shortest):
                    shortest = tail
        if shortest and shortest not in PUNCTUATION:
            texts.append(shortest)
    return texts or [response]


def parse_number(text: str) -> float | None:
    """Return a text as a number of two decimals, None if it is none; commas are removed.

    Whatever Python's float() accepts is a number: nan, inf, 1_000 and full-width digits are.
    """
    try:
        return round(float(text.replace(",", "")), 2)
    except ValueError:
        return None


def number_patterns(comma: str, boundary: str, not_followed_by: str) -> tuple[re.Pattern[str], ...]:
    """Return the patterns of numbers in a text: with a thousands `comma`, scientific, plain.

    No number begins inside of a run of digits: a match there would be the end of one that begins
    before. Saying so, and taking runs whole (`++`), keeps the time linear in the text's length.
    `boundary` is the pattern around whole numbers, `not_followed_by` what must not follow a plain
    one.
    """
    return (
        re.compile(rf"-?{boundary}\d{{1,3}}(?:{comma}\d{{3}})+{boundary}"),
        # the group is not taken whole (`?+`), which Python before 3.11.5 matches wrongly
        re.compile(r"-?(?<!\d)\d++(?:\.\d++)?[eE][+-]?\d+"),
        re.compile(
            rf"-?(?:(?:(?<!\d)\d++)?\.\d+|(?<!\d)\d+{boundary})"
            rf"(?![eE][+-]?\d)(?!{not_followed_by})"
        ),
    )


def find_numbers(texts: Iterable[str], patterns: Sequence[re.Pattern[str]]) -> list[str]:
    """Return the numbers in the texts as they are written there, parts of numbers included."""
    return [number for text in texts for pattern in patterns for number in pattern.findall(text)]


def distinct_values(values: Iterable[AnswerValue]) -> list[AnswerValue]:
    """Return the values once each: numbers, then texts, both sorted."""
    return sorted(set(values), key=lambda value: (isinstance(value, str), value))


def has_any_gold(predicted_values: Iterable[AnswerValue], golds: Sequence[object]) -> bool:
    """Return whether a gold text is part of a predicted text, or a gold number is predicted."""
    texts = [gold for gold in golds if isinstance(gold, str)]
    return any(
        any(gold in value for gold in texts) if isinstance(value, str) else value in golds
        for value in predicted_values
    )


# MMMU, multiple choice.

# (how a letter is written in a response, how its position is looked for if several are found)
MMMU_LETTER_FORMS = (("({})", "({})"), (" {} ", " {} "))
# "ABC " contains C, but gives no position
LMMS_LETTER_FORMS = (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} "))
SHORT_RESPONSE_WORDS = 5  # only a longer response may answer in the words of an option


def parse_letter_official(item: AnsweredItem) -> str | None:
    """Parse a letter as MMMU does; None if there is none."""
    return _last_letter(item, MMMU_LETTER_FORMS)


def parse_letter_lmms(item: AnsweredItem) -> str | None:
    """Parse a letter as lmms-eval does, which accepts "B." and any word that ends in a letter."""
    return _last_letter(item, LMMS_LETTER_FORMS)


def _last_letter(item: AnsweredItem, letter_forms: Sequence[tuple[str, str]]) -> str | None:
    """Return the last letter of the first form in which there is any.

    Without a letter, the option whose words come last is taken. The first of equals wins.
    """
    response = strip_punctuation(require_text(item, item.response, "response"))
    for form, position_form in letter_forms:
        letters = [
            letter for letter in option_letters(item.options) if form.format(letter) in response
        ]
        if letters:
            return max(letters, key=lambda letter: response.rfind(position_form.format(letter)))
    if len(response.split()) <= SHORT_RESPONSE_WORDS:
        return None
    positions = {
        letter: response.lower().rfind(require_text(item, option, f"option {letter}").lower())
        for letter, option in zip(option_letters(item.options), item.options, strict=False)
    }
    last = max(positions, key=positions.__getitem__, default=None)
    return last if last and positions[last] >= 0 else None


def whole_response(item: AnsweredItem) -> object:
    """Return the response as it is, as MMMU does with answers that are marked as parsed."""
    return item.response


def parse_letter_raw(item: AnsweredItem) -> str:
    """Return a response that is a letter and nothing else; "" for any other."""
    response = require_text(item, item.response, "response")
    return response if len(response) == 1 and response in option_letters(item.options) else ""


def is_correct_letter(prediction: object, item: AnsweredItem) -> bool:
    """Return whether a letter is the right one, or one of them."""
    gold = item.answer
    return prediction in gold if isinstance(gold, list) else bool(prediction == gold)


# MMMU, open questions.

OPEN_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
OPEN_NUMBER_PATTERNS = number_patterns(",", r"\b", r"[,\d]")


def parse_open_values(item: AnsweredItem) -> list[AnswerValue]:
    """Return what a response to an open question may mean: texts, and the numbers in them.

    The reference lowers the case before it splits sentences at ". A", so that only line ends split.
    A tuple holds values that MMMU's own code has parsed already.
    """
    if isinstance(item.response, tuple):
        return list(item.response)
    response = require_text(item, item.response, "response").strip().strip(".").lower()
    texts = texts_after_cues(response, response.split("\n"), OPEN_CUES, last_part_cues=("=",))
    texts = [*texts, *find_numbers(texts, OPEN_NUMBER_PATTERNS)]
    return distinct_values(value for text in texts for value in normalize_open_answer(text))


def parse_open_lmms(item: AnsweredItem) -> str:
    """Return the first of the values as text, which is all that lmms-eval keeps.

    Which one is first depends on hash order there; whether it counts as right does not.
    """
    return str(next(iter(parse_open_values(item)), ""))


def parse_open_raw(item: AnsweredItem) -> list[AnswerValue]:
    """Return the whole response, normalised; values that are parsed already as they are."""
    if isinstance(item.response, tuple):
        return list(item.response)
    return normalize_open_answer(require_text(item, item.response, "response"))


def is_correct_open(prediction: Sequence[AnswerValue], item: AnsweredItem) -> bool:
    """Return whether a predicted text contains a right answer, or a predicted number is one."""
    return has_any_gold(prediction, open_golds(item))


def is_correct_open_lmms(prediction: str, item: AnsweredItem) -> bool:
    """Look for a right answer in the single characters of the text, as lmms-eval does.

    It mistakes the text for the list that it was before, so that only an empty answer is found.
    """
    return has_any_gold(list(prediction), open_golds(item))


def is_correct_open_raw(prediction: Sequence[AnswerValue], item: AnsweredItem) -> bool:
    """Return whether the response is a right answer, apart from case and decimals."""
    return any(value in open_golds(item) for value in prediction)


def open_golds(item: AnsweredItem) -> list[AnswerValue]:
    """Return the right answers of an open question, normalised."""
    answers = item.answer if isinstance(item.answer, list) else [item.answer]
    return [
        value
        for answer in answers
        for value in normalize_open_answer(require_text(item, answer, "answer"))
    ]


def normalize_open_answer(text: str) -> list[AnswerValue]:
    """Return a text as a number, or in lower case; a single letter with a space at either side.

    "a" would be found in nearly every text, " a" and "a " are not.
    """
    text = text.strip()
    number = parse_number(text)
    if number is not None:
        return [number]
    text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


# CMMMU, letters.

CMMMU_LETTERS = "ABCD"  # of every question; options that are missing are empty


def parse_letters_lmms(item: AnsweredItem) -> str | None:
    """Return the most frequent letters of the response, in alphabetical order; None without any.

    "(B)" counts before any capital from A to D, wherever it stands ("DNA" is AD), and that before
    the words of options.
    """
    response = strip_punctuation(require_text(item, item.response, "response"))
    for form in ("({})", "{}"):
        counts = {letter: response.count(form.format(letter)) for letter in CMMMU_LETTERS}
        if letters := _most_frequent(counts):
            return letters
    if not response.strip():
        return None
    options = [*item.options, "", "", "", ""][: len(CMMMU_LETTERS)]
    return _most_frequent(
        {
            letter: response.count(require_text(item, option, f"option {letter}"))
            for letter, option in zip(CMMMU_LETTERS, options, strict=True)
        }
    )


def _most_frequent(counts: Mapping[str, int]) -> str | None:
    """Return the letters with the highest count, None if all are 0."""
    most = max(counts.values())
    return "".join(letter for letter, count in counts.items() if count == most) if most else None


def parse_letters_official(item: AnsweredItem) -> str | None:
    """Parse letters as CMMMU does, for which an empty response ("", null) is wrong: ""."""
    return parse_letters_lmms(item) if item.response else ""


def parse_letters_raw(item: AnsweredItem) -> str:
    """Return a response that is letters from A to D and nothing else; "" for any other."""
    response = require_text(item, item.response, "response")
    return response if set(response) <= set(CMMMU_LETTERS) else ""


def is_exact_answer(prediction: object, item: AnsweredItem) -> bool:
    """Return whether the letters, or the judgement, are the answer."""
    return bool(prediction == item.answer)


# CMMMU, true or false.

TRUE_ANSWER, FALSE_ANSWER = "对", "错"
TRUE_WORDS = ("正确", "对", "准确", "肯定", "对的")
FALSE_WORDS = ("不对", "错误", "不正确", "不准确", "不合适", "否定", "错的", "错")
UNCLEAR_WORDS = ("对错", "是否正确", "否正确", "或者", "是否", "正确性", "对不")
DENIAL_PATTERN = re.compile(r"不(?:太|很|够|完全)?(?:正确|对|准确|肯定)")
NEGATION_PATTERN = re.compile(r"(?<!是)不是(?=正确|对|准确|肯定)")  # 是不是 asks
SENTENCE_END = re.compile(r"。|\n")
JUDGEMENT_CUES = ("是", "为", "所以", "判断", "陈述", "说法", "表达", "答案", "结果")


def parse_judgement_official(item: AnsweredItem) -> str | None:
    """Parse 对 or 错 as CMMMU does; None where as many texts say one as the other.

    TRUE_WORDS are looked for before FALSE_WORDS, so that 不正确 and 不对 count as 对.
    """
    return _majority_judgement(require_text(item, item.response, "response"), denial_pattern=None)


def parse_judgement_strict(item: AnsweredItem) -> str | None:
    """Parse 对 or 错 as CMMMU does, but a denial counts as 错.

    A text in which 不, 不太, 不很, 不够, 不完全 or 不是 stands before 正确, 对, 准确 or 肯定 is 错,
    whatever else it contains. Nothing else is parsed in another way (没错 is 错 here as well).
    """
    response = require_text(item, item.response, "response")
    # or the cue 是 would cut the 不 of 不是 off
    return _majority_judgement(NEGATION_PATTERN.sub("不", response), denial_pattern=DENIAL_PATTERN)


def _majority_judgement(response: str, denial_pattern: re.Pattern[str] | None) -> str | None:
    response = response.strip("。").strip()
    votes = {TRUE_ANSWER: 0, FALSE_ANSWER: 0}
    for text in set(texts_after_cues(response, SENTENCE_END.split(response), JUDGEMENT_CUES)):
        if any(word in text for word in UNCLEAR_WORDS):
            continue
        if denial_pattern and denial_pattern.search(text):
            votes[FALSE_ANSWER] += 1
        elif any(word in text for word in TRUE_WORDS):
            votes[TRUE_ANSWER] += 1
        elif any(word in text for word in FALSE_WORDS):
            votes[FALSE_ANSWER] += 1
    if votes[TRUE_ANSWER] == votes[FALSE_ANSWER]:
        return None
    return max(votes, key=votes.__getitem__)


def parse_judgement_raw(item: AnsweredItem) -> str:
    """Return a response that is 对 or 错 and nothing else; "" for any other."""
    response = require_text(item, item.response, "response")
    return response if response in (TRUE_ANSWER, FALSE_ANSWER) else ""


# CMMMU, fill in the blank.

FILL_IN_CUES = (
    *("是", "为", "所以", "等于", "方案", "选择"),
    *("正确答案", "因此", "最后", "答案", "结果"),
)
FILL_IN_NUMBER_PATTERNS = number_patterns("，", "", r"，\d")
EXTRA_LENGTH, EXTRA_LATIN_LETTERS = 20, 2  # a text that exceeds the answer by more is no answer


def parse_fill_in_values(item: AnsweredItem) -> list[AnswerValue]:
    """Return what may fill the blank: texts, and the numbers in them."""
    response = require_text(item, item.response, "response").strip("。").strip()
    sentences = SENTENCE_END.split(response)
    texts = texts_after_cues(response, sentences, FILL_IN_CUES, last_part_cues=("=",))
    texts = [*texts, *find_numbers(texts, FILL_IN_NUMBER_PATTERNS)]
    return distinct_values(value for text in texts for value in normalize_fill_in(text, item))


def parse_fill_in_raw(item: AnsweredItem) -> list[AnswerValue]:
    """Return the whole response, normalised."""
    return normalize_fill_in(require_text(item, item.response, "response"), item)


def is_correct_fill_in(prediction: Sequence[AnswerValue], item: AnsweredItem) -> bool:
    """Return whether a predicted text contains the answer, or a predicted number is the answer."""
    return has_any_gold(prediction, normalize_fill_in(item.answer, item))


def is_correct_fill_in_raw(prediction: Sequence[AnswerValue], item: AnsweredItem) -> bool:
    """Return whether the response is the answer, apart from decimals."""
    return any(value in normalize_fill_in(item.answer, item) for value in prediction)


def normalize_fill_in(text: str, item: AnsweredItem) -> list[AnswerValue]:
    """Return a text as a number or as it is; nothing if it is much longer than the answer."""
    answer = require_text(item, item.answer, "answer")
    text = text.strip()
    number = parse_number(text)
    if number is not None:
        return [number]
    too_long = len(text) > len(answer) + EXTRA_LENGTH
    too_latin = _count_latin_letters(text) > _count_latin_letters(answer) + EXTRA_LATIN_LETTERS
    return [] if too_long or too_latin else [text]


def _count_latin_letters(text: str) -> int:
    return sum(character.isascii() and character.isalpha() for character in text)
