"""Metrics of free-text answers: exact match, VQA accuracy, and torchmetrics' F1 and chrF."""

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
"""Words whose apostrophe the VQA challenge restores (she's and let's are not among them)."""
RESTORED_CONTRACTIONS = {
    word[:index] + word[index + 1 :]: word
    for word in CONTRACTIONS
    for index, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}  # as the challenge's own table has it
FULL_SCORE_VOTES = 3  # people whose agreement gives an accuracy of 1


def is_exact_match(response: str, answers: Sequence[str]) -> bool:
    """Return whether a response is one of the right answers, word for word."""
    return response in answers


def vqa_accuracy(response: str, answers: Sequence[str]) -> float:
    """Return the accuracy of the VQA challenge (Antol et al. 2015, arXiv:1505.00468), 0 to 1.

    For each person, a response scores a third for every other person who gave it, at most 1; the
    accuracy is the mean over people. With at most three answers one that agrees is enough.
    Responses and answers are normalised first.
    """
    response = normalize_vqa_answer(response)
    answers = [normalize_vqa_answer(answer) for answer in answers]
    if len(answers) <= FULL_SCORE_VOTES:
        return float(response in answers)
    votes = answers.count(response)
    # a person who gave the same answer is not one of the others
    scores = [min(1.0, (votes - (answer == response)) / FULL_SCORE_VOTES) for answer in answers]
    return sum(scores) / len(scores)


def normalize_vqa_answer(text: str) -> str:
    """Return a text as the VQA challenge compares it: no punctuation or articles, digits."""
    text = re.sub(r"[\n\t]", " ", text).strip()
    original = text
    for mark in PUNCTUATION:
        is_separate = (
            f"{mark} " in original or f" {mark}" in original or THOUSANDS_COMMA.search(original)
        )
        text = text.replace(mark, "" if is_separate else " ")
    text = PERIOD_PATTERN.sub("", text, 32)  # the challenge passes re.UNICODE, 32, as the count
    words = [DIGITS_OF_WORD.get(word, word) for word in text.lower().split()]
    return " ".join(RESTORED_CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def text_overlap(responses: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return how well the responses' text overlaps with the answers', in percent.

    `f1` is over words after SQuAD's normalisation, `chrf` (Popovic 2015) over n-grams of up to six
    characters, which needs no words and so serves Chinese.
    """
    predictions = [{"prediction_text": text, "id": str(n)} for n, text in enumerate(responses)]
    targets: list[dict[str, Any]] = [
        {"answers": {"text": list(texts), "answer_start": [0] * len(texts)}, "id": str(n)}
        for n, texts in enumerate(answers)
    ]
    f1 = float(squad(predictions, targets)["f1"])
    chrf = chrf_score(list(responses), [list(texts) for texts in answers], n_word_order=0)
    return {"f1": round(f1, 2), "chrf": round(100 * float(torch.as_tensor(chrf)), 2)}
