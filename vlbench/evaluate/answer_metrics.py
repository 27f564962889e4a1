"""Measures of free answers: exact match, VQA accuracy, and torchmetrics' F1 and chrF."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torchmetrics.functional.text import chrf_score, squad

DIGIT_WORDS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
)
DIGITS_OF_WORD = {"none": "0", **{word: str(number) for number, word in enumerate(DIGIT_WORDS)}}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD_PATTERN = re.compile(r"\.(?!\d)")
THOUSANDS_COMMA = re.compile(r"(?<=\d),+(?=\d)")
CONTRACTIONS = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
    hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
    might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't shan't she'd've
    should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've there're
    there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll
    you're you've
""".split()
"""Words whose apostrophe is put back, of the VQA challenge (she's and let's are not among them)."""
RESTORED_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in CONTRACTIONS
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}  # as the challenge's own table has it
FULL_MARK_VOTES = 3  # people whose answer it takes for a full mark


def is_exact_match(response: str, answers: Sequence[str]) -> bool:
    """Tell whether a response is one of the right answers, word for word."""
    return response in answers


def vqa_accuracy(response: str, answers: Sequence[str]) -> float:
    """Return the accuracy of the VQA challenge (Antol et al. 2015, arXiv:1505.00468), 0 to 1.

    A response counts a third for each of the other people who gave it, at most 1, averaged over
    leaving out each person. With fewer than four answers one that agrees is enough. Responses and
    answers are normalised first.
    """
    said, given = (
        normalize_vqa_answer(response),
        [normalize_vqa_answer(answer) for answer in answers],
    )
    if len(given) <= FULL_MARK_VOTES:
        return float(said in given)
    agree = given.count(said)
    # a person who said the same is not one of the others
    marks = [min(1.0, (agree - (answer == said)) / FULL_MARK_VOTES) for answer in given]
    return sum(marks) / len(marks)


def normalize_vqa_answer(text: str) -> str:
    """Return a text as the VQA challenge compares it: no marks, no articles, numbers as digits."""
    text = re.sub(r"[\n\t]", " ", text).strip()
    whole = text
    for mark in PUNCTUATION:
        apart = f"{mark} " in whole or f" {mark}" in whole or THOUSANDS_COMMA.search(whole)
        text = text.replace(mark, "" if apart else " ")
    text = PERIOD_PATTERN.sub(
        "", text, 32
    )  # the challenge's code passes re.UNICODE, 32, as a count
    words = [DIGITS_OF_WORD.get(word, word) for word in text.lower().split()]
    return " ".join(RESTORED_CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def text_overlap(responses: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return how much of the answers' text is in the responses, in percent.

    `f1` is that of words after SQuAD's normalisation, `chrf` that of runs of up to six characters
    (Popovic 2015), which needs no words and so serves Chinese.
    """
    told = [{"prediction_text": text, "id": str(n)} for n, text in enumerate(responses)]
    known: list[dict[str, Any]] = [
        {"answers": {"text": list(some), "answer_start": [0] * len(some)}, "id": str(n)}
        for n, some in enumerate(answers)
    ]
    f1 = float(squad(told, known)["f1"])
    chrf = chrf_score(list(responses), [list(some) for some in answers], n_word_order=0)
    return {"f1": round(f1, 2), "chrf": round(100 * float(torch.as_tensor(chrf)), 2)}
