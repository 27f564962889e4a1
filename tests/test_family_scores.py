"""Scores of families: shares, intervals that hold what they promise, questions without a family."""

from __future__ import annotations

import numpy as np
import pytest

from vlbench.data.sample import ChatTurn, Sample
from vlbench.evaluate.family_scores import score_families
from vlbench.evaluate.heldout_questions import EvalQuestion, scene_questions
from vlbench.evaluate.tasks.score_report import wilson_interval


def question(family: str) -> EvalQuestion:
    return EvalQuestion(Sample("1", (ChatTurn("human", "?"),)), "yes", "", "en", family=family)


def test_each_family_has_its_share_with_and_without_the_image() -> None:
    asked = [question(name) for name in ("crowd", "gist", "crowd", "", "crowd", "gist")]
    answers = ["yes", "yes", "no", "yes", "yes", "no"]
    scores = score_families(asked, answers, ["no", "yes", "no", "no", "yes", "yes"])
    assert list(scores) == ["crowd", "gist"]
    assert scores["crowd"]["accuracy"] == 2 / 3 and scores["crowd"]["blank_accuracy"] == 1 / 3
    assert scores["gist"]["accuracy"] == 0.5 and scores["gist"]["blank_accuracy"] == 1.0
    assert [score["questions"] for score in scores.values()] == [3, 2]
    assert score_families([question("")], ["yes"], ["yes"]) == {}


def test_the_exam_has_300_questions_of_each_family() -> None:
    asked = scene_questions("new")
    answers = [one.answer for one in asked]
    scores = score_families(asked, answers, ["" for _ in asked])
    assert len(scores) == 6 and {score["questions"] for score in scores.values()} == {300}
    assert all(score["interval"][0] > 0.98 for score in scores.values())


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.99])
def test_the_interval_covers_the_truth_as_often_as_it_says(share: float) -> None:
    rights = np.random.default_rng(0).binomial(300, share, 4000)
    ends = np.array([wilson_interval(int(right), 300) for right in rights])
    covered = ((ends[:, 0] <= share) & (share <= ends[:, 1])).mean()
    assert 0.93 <= covered <= 0.985
    for right in (0, 300):
        low, high = wilson_interval(right, 300)
        assert 0 <= low < high <= 1
