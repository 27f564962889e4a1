"""Measures of free answers: VQA accuracy as the challenge computes it, exact match, overlap."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlbench.evaluate.answer_metrics import (
    is_exact_match,
    normalize_vqa_answer,
    text_overlap,
    vqa_accuracy,
)

GOLDEN = json.loads(
    (Path(__file__).parent / "goldens/evaluation/vqa.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("case", GOLDEN["normal"], ids=lambda case: case["text"][:20] or "empty")
def test_texts_are_normalised_as_the_reference_does(case):
    assert normalize_vqa_answer(case["text"]) == case["normal"]


def test_vqa_accuracy_is_that_of_the_reference():
    for case in GOLDEN["accuracy"]:
        ours = vqa_accuracy(case["response"], case["answers"])
        assert ours == pytest.approx(case["accuracy"], abs=1e-12), case


def test_three_people_who_agree_are_enough_and_two_are_not():
    others = [f"other {n}" for n in range(6)]
    assert vqa_accuracy("red", ["red"] * 4 + others) == 1
    assert vqa_accuracy("a red.", ["red"] * 2 + others + ["x", "y"]) == pytest.approx(0.6)
    assert vqa_accuracy("blue", ["red"] * 10) == 0


def test_a_single_answer_needs_one_that_agrees():
    assert vqa_accuracy("The two!", ["2"]) == 1
    assert vqa_accuracy("three", ["2"]) == 0


def test_exact_is_word_for_word():
    assert is_exact_match("red", ["blue", "red"])
    assert not is_exact_match("Red", ["blue", "red"])


def test_overlap_is_full_for_equal_texts_of_any_language_and_less_for_others():
    equal = text_overlap(["a red ball", "红色的球"], [["a red ball"], ["红色的球"]])
    assert equal == {"f1": 100.0, "chrf": 100.0}
    part = text_overlap(["a red ball", "红色的"], [["a blue ball"], ["红色的球"]])
    assert 0 < part["f1"] < 100 and 0 < part["chrf"] < 100
    several = text_overlap(["ball"], [["cube", "ball"]])
    assert several["f1"] == 100.0
