"""How CMMMU's scorers read a response: letters (选择), 对 or 错 (判断), or what fills a gap (填空).

The behaviour is that of CMMMU's `eval_utils.py` and, where it says so, of lmms-eval's copy of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

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
from vlbench.evaluate.tasks.scored_items import AnsweredItem, require_text

OPTION_LETTERS = "ABCD"  # of every question; options that are missing are empty
TRUE_ANSWER, FALSE_ANSWER = "对", "错"
TRUE_WORDS = ("正确", "对", "准确", "肯定", "对的")
FALSE_WORDS = ("不对", "错误", "不正确", "不准确", "不合适", "否定", "错的", "错")
UNCLEAR_WORDS = ("对错", "是否正确", "否正确", "或者", "是否", "正确性", "对不")
DENIAL_PATTERN = re.compile(r"不(?:太|很|够|完全)?(?:正确|对|准确|肯定)")
NEGATION_PATTERN = re.compile(r"(?<!是)不是(?=正确|对|准确|肯定)")  # 是不是 asks

SENTENCE_END = re.compile(r"。|\n")
JUDGEMENT_CUES = ("是", "为", "所以", "判断", "陈述", "说法", "表达", "答案", "结果")
GAP_CUES = (
    *("是", "为", "所以", "等于", "方案", "选择"),
    *("正确答案", "因此", "最后", "答案", "结果"),
)
NUMBER_PATTERNS = number_patterns("，", "", r"，\d")
EXTRA_LENGTH, EXTRA_LATIN_LETTERS = 20, 2  # a text that exceeds the answer by more is no answer


def parse_letters_lmms(item: AnsweredItem) -> str | None:
    """Return the letters that the response has most often, in order; None if it has none.

    "(B)" counts before any capital from A to D, wherever it stands ("DNA" is AD), and that before
    the words of options.
    """
    said = strip_punctuation(require_text(item, item.response, "response"))
    for form in ("({})", "{}"):
        if found := _most_frequent({one: said.count(form.format(one)) for one in OPTION_LETTERS}):
            return found
    if not said.strip():
        return None
    options = [*item.options, "", "", "", ""][: len(OPTION_LETTERS)]
    return _most_frequent(
        {
            letter: said.count(require_text(item, option, f"option {letter}"))
            for letter, option in zip(OPTION_LETTERS, options, strict=True)
        }
    )


def _most_frequent(counts: Mapping[str, int]) -> str | None:
    """Return the letters with the highest count, None if all are 0."""
    most = max(counts.values())
    return "".join(letter for letter, count in counts.items() if count == most) if most else None


def parse_letters_official(item: AnsweredItem) -> str | None:
    """Read letters as CMMMU does, for which an empty response ("", null) is wrong: ""."""
    return parse_letters_lmms(item) if item.response else ""


def parse_letters_bare(item: AnsweredItem) -> str:
    """Take a response that is letters from A to D and nothing else; "" for any other."""
    said = require_text(item, item.response, "response")
    return said if set(said) <= set(OPTION_LETTERS) else ""


def is_exact_answer(prediction: object, item: AnsweredItem) -> bool:
    """Say whether the letters or the word are the answer."""
    return prediction == item.answer


def parse_judgement_official(item: AnsweredItem) -> str | None:
    """Read 对 or 错 as CMMMU does; None where as many texts say one as the other.

    TRUE is looked for before FALSE, so that 不正确 and 不对 are 对.
    """
    return _majority_judgement(require_text(item, item.response, "response"), denial_pattern=None)


def parse_judgement_strict(item: AnsweredItem) -> str | None:
    """Read 对 or 错 as CMMMU does, but take what is denied for what it says.

    A text in which 不, 不太, 不很, 不够, 不完全 or 不是 stands before 正确, 对, 准确 or 肯定 is 错,
    whatever else is in it. Nothing else is read in another way (没错 is 错 here as well).
    """
    said = require_text(item, item.response, "response")
    return _majority_judgement(
        NEGATION_PATTERN.sub("不", said), denial_pattern=DENIAL_PATTERN
    )  # the cue 是 would cut its 不 off


def _majority_judgement(response: str, denial_pattern: re.Pattern[str] | None) -> str | None:
    response = response.strip("。").strip()
    votes = {TRUE_ANSWER: 0, FALSE_ANSWER: 0}
    for one in set(texts_after_cues(response, SENTENCE_END.split(response), JUDGEMENT_CUES)):
        if any(word in one for word in UNCLEAR_WORDS):
            continue
        if denial_pattern and denial_pattern.search(one):
            votes[FALSE_ANSWER] += 1
        elif any(word in one for word in TRUE_WORDS):
            votes[TRUE_ANSWER] += 1
        elif any(word in one for word in FALSE_WORDS):
            votes[FALSE_ANSWER] += 1
    if votes[TRUE_ANSWER] == votes[FALSE_ANSWER]:
        return None
    return max(votes, key=votes.__getitem__)


def parse_judgement_bare(item: AnsweredItem) -> str:
    """Take a response that is 对 or 错 and nothing else; "" for any other."""
    said = require_text(item, item.response, "response")
    return said if said in (TRUE_ANSWER, FALSE_ANSWER) else ""


def parse_gap_values(item: AnsweredItem) -> list[AnswerValue]:
    """Return what may fill the gap: texts, and the numbers in them."""
    said = require_text(item, item.response, "response").strip("。").strip()
    found = texts_after_cues(said, SENTENCE_END.split(said), GAP_CUES, last_part_cues=("=",))
    written = [*found, *find_numbers(found, NUMBER_PATTERNS)]
    return distinct_values(value for one in written for value in normalize_answer(one, item))


def parse_gap_bare(item: AnsweredItem) -> list[AnswerValue]:
    """Return the response, normalised and as a whole."""
    return normalize_answer(require_text(item, item.response, "response"), item)


def has_correct_answer(prediction: Sequence[AnswerValue], item: AnsweredItem) -> bool:
    """Say whether a predicted text has the answer in it, or a predicted number is the answer."""
    return has_any_gold(prediction, normalize_answer(item.answer, item))


def is_correct_value(prediction: Sequence[AnswerValue], item: AnsweredItem) -> bool:
    """Say whether the response is the answer, apart from decimals."""
    return any(value in normalize_answer(item.answer, item) for value in prediction)


def normalize_answer(written: str, item: AnsweredItem) -> list[AnswerValue]:
    """Return a text as a number or as it is; nothing if it is much longer than the answer."""
    answer = require_text(item, item.answer, "answer")
    written = written.strip()
    value = parse_number(written)
    if value is not None:
        return [value]
    long = len(written) > len(answer) + EXTRA_LENGTH
    wordy = _count_latin_letters(written) > _count_latin_letters(answer) + EXTRA_LATIN_LETTERS
    return [] if long or wordy else [written]


def _count_latin_letters(written: str) -> int:
    return sum(one.isascii() and one.isalpha() for one in written)
