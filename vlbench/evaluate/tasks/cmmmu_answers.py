"""How CMMMU's scorers read a response: letters (选择), 对 or 错 (判断), or what fills a gap (填空).

The behaviour is that of CMMMU's `eval_utils.py` and, where it says so, of lmms-eval's copy of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from vlbench.evaluate.tasks.items import Item, text
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

LETTERS = "ABCD"  # of every question; options that are missing are empty
RIGHT, WRONG = "对", "错"
TRUE = ("正确", "对", "准确", "肯定", "对的")
FALSE = ("不对", "错误", "不正确", "不准确", "不合适", "否定", "错的", "错")
UNCLEAR = ("对错", "是否正确", "否正确", "或者", "是否", "正确性", "对不")
DENIED = re.compile(r"不(?:太|很|够|完全)?(?:正确|对|准确|肯定)")
NOT_IS = re.compile(r"(?<!是)不是(?=正确|对|准确|肯定)")  # 是不是 asks

ENDS = re.compile(r"。|\n")
TRUTH_CUES = ("是", "为", "所以", "判断", "陈述", "说法", "表达", "答案", "结果")
GAP_CUES = (
    *("是", "为", "所以", "等于", "方案", "选择"),
    *("正确答案", "因此", "最后", "答案", "结果"),
)
FORMS = number_forms("，", "", r"，\d")
EXTRA_LENGTH, EXTRA_LETTERS = 20, 2  # a text that exceeds the answer by more is no answer


def lmms_letters(item: Item) -> str | None:
    """Return the letters that the response has most often, in order; None if it has none.

    "(B)" counts before any capital from A to D, wherever it stands ("DNA" is AD), and that before
    the words of options.
    """
    said = bare(text(item, item.response, "response"))
    for form in ("({})", "{}"):
        if found := _most({one: said.count(form.format(one)) for one in LETTERS}):
            return found
    if not said.strip():
        return None
    options = [*item.options, "", "", "", ""][: len(LETTERS)]
    return _most(
        {
            letter: said.count(text(item, option, f"option {letter}"))
            for letter, option in zip(LETTERS, options, strict=True)
        }
    )


def _most(counts: Mapping[str, int]) -> str | None:
    """Return the letters with the highest count, None if all are 0."""
    most = max(counts.values())
    return "".join(letter for letter, count in counts.items() if count == most) if most else None


def official_letters(item: Item) -> str | None:
    """Read letters as CMMMU does, for which an empty response ("", null) is wrong: ""."""
    return lmms_letters(item) if item.response else ""


def bare_letters(item: Item) -> str:
    """Take a response that is letters from A to D and nothing else; "" for any other."""
    said = text(item, item.response, "response")
    return said if set(said) <= set(LETTERS) else ""


def is_same(prediction: object, item: Item) -> bool:
    """Say whether the letters or the word are the answer."""
    return prediction == item.answer


def official_truth(item: Item) -> str | None:
    """Read 对 or 错 as CMMMU does; None where as many texts say one as the other.

    TRUE is looked for before FALSE, so that 不正确 and 不对 are 对.
    """
    return _truth(text(item, item.response, "response"), denial=None)


def strict_truth(item: Item) -> str | None:
    """Read 对 or 错 as CMMMU does, but take what is denied for what it says.

    A text in which 不, 不太, 不很, 不够, 不完全 or 不是 stands before 正确, 对, 准确 or 肯定 is 错,
    whatever else is in it. Nothing else is read in another way (没错 is 错 here as well).
    """
    said = text(item, item.response, "response")
    return _truth(NOT_IS.sub("不", said), denial=DENIED)  # the cue 是 would cut its 不 off


def _truth(said: str, denial: re.Pattern[str] | None) -> str | None:
    said = said.strip("。").strip()
    votes = {RIGHT: 0, WRONG: 0}
    for one in set(tails(said, ENDS.split(said), TRUTH_CUES)):
        if any(word in one for word in UNCLEAR):
            continue
        if denial and denial.search(one):
            votes[WRONG] += 1
        elif any(word in one for word in TRUE):
            votes[RIGHT] += 1
        elif any(word in one for word in FALSE):
            votes[WRONG] += 1
    if votes[RIGHT] == votes[WRONG]:
        return None
    return max(votes, key=votes.__getitem__)


def bare_truth(item: Item) -> str:
    """Take a response that is 对 or 错 and nothing else; "" for any other."""
    said = text(item, item.response, "response")
    return said if said in (RIGHT, WRONG) else ""


def gap_values(item: Item) -> list[Value]:
    """Return what may fill the gap: texts, and the numbers in them."""
    said = text(item, item.response, "response").strip("。").strip()
    found = tails(said, ENDS.split(said), GAP_CUES, last=("=",))
    written = [*found, *numbers(found, FORMS)]
    return distinct(value for one in written for value in normal(one, item))


def bare_gap(item: Item) -> list[Value]:
    """Return the response, normalised and as a whole."""
    return normal(text(item, item.response, "response"), item)


def is_gap(prediction: Sequence[Value], item: Item) -> bool:
    """Say whether a predicted text has the answer in it, or a predicted number is the answer."""
    return holds(prediction, normal(item.answer, item))


def is_value(prediction: Sequence[Value], item: Item) -> bool:
    """Say whether the response is the answer, apart from decimals."""
    return any(value in normal(item.answer, item) for value in prediction)


def normal(written: str, item: Item) -> list[Value]:
    """Return a text as a number or as it is; nothing if it is much longer than the answer."""
    answer = text(item, item.answer, "answer")
    written = written.strip()
    value = number(written)
    if value is not None:
        return [value]
    long = len(written) > len(answer) + EXTRA_LENGTH
    wordy = _latin(written) > _latin(answer) + EXTRA_LETTERS
    return [] if long or wordy else [written]


def _latin(written: str) -> int:
    return sum(one.isascii() and one.isalpha() for one in written)
