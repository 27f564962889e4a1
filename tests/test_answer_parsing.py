"""Answers to MMMU and CMMMU are read and judged as the reference code did, case by case."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from vlbench.errors import UserError
from vlbench.evaluate.tasks.benchmark_types import AnsweredItem, ScoredItem
from vlbench.evaluate.tasks.scoring_protocols import SCORING_PROTOCOLS, score_items

GOLDENS = Path(__file__).parent / "goldens/evaluation"
MMMU = json.loads((GOLDENS / "mmmu_parse.json").read_text(encoding="utf-8"))
CMMMU = json.loads((GOLDENS / "cmmmu_parse.json").read_text(encoding="utf-8"))
AGGREGATION = json.loads((GOLDENS / "aggregation.json").read_text(encoding="utf-8"))
CASES = {
    "choice": MMMU["multiple_choice"],
    "open": MMMU["open"],
    "cmmmu": CMMMU["cases"],
}


def item(case: dict[str, Any]) -> AnsweredItem:
    """Return the item of a recorded case."""
    kind = case.get("type") or case.get("question_type") or "multiple-choice"
    options = case.get("options") or list(case.get("index2ans", {}).values())
    return AnsweredItem(case["case"], kind, options, case["answer"], case["response"])


def score_one(task: str, protocol: str, asked: AnsweredItem) -> ScoredItem | None:
    """Score one item; None where the reference raises an error and we a UserError."""
    try:
        return score_items(task, protocol, [asked])[0]
    except UserError:
        return None


def verdict(task: str, protocol: str, asked: AnsweredItem) -> tuple[object, object, bool]:
    """Return prediction, correctness and fallback, "random" for what is drawn."""
    scored = score_one(task, protocol, asked)
    assert scored is not None
    if scored.fallback:
        return "random", "random", True
    return scored.prediction, scored.correct, False


def matches_golden(golden: dict[str, Any], ours: tuple[object, object, bool]) -> bool:
    """Say whether a verdict is what the golden says, of all that it says."""
    keys = ("pred", "correct")
    compared = [(golden[key], mine) for key, mine in zip(keys, ours, strict=False) if key in golden]
    return all(plain(left) == plain(right) for left, right in compared) and ours[2] == (
        "random" in (golden.get("pred"), golden.get("correct"))
    )


def plain(value: object) -> object:
    """Return numbers as text, so that nan is nan."""
    if isinstance(value, list):
        return [plain(one["float"] if isinstance(one, dict) else one) for one in value]
    return str(value) if isinstance(value, float) else value


@pytest.mark.parametrize(
    ("kind", "protocol", "reference"),
    [
        ("choice", "official", "official"),
        ("choice", "lmms", "lmms_eval_head"),
        ("choice", "lmms", "lmms_eval_2024_02"),
        ("open", "official", "official"),
        ("open", "official", "yi"),
        ("open", "official", "lmms_eval_2024_02"),
        ("open", "lmms", "lmms_eval_head"),
        ("open", "yi", "official"),
        ("open", "strict", "official"),
        ("cmmmu", "official", "official"),
        ("cmmmu", "yi", "official"),
        ("cmmmu", "lmms", "lmms_eval_head"),
    ],
)
def test_every_case_is_read_as_the_reference_read_it(kind, protocol, reference):
    task = "cmmmu" if kind == "cmmmu" else "mmmu"
    for case in CASES[kind]:
        golden = case[reference]
        if reference == "lmms_eval_head" and kind == "cmmmu":  # it records no predictions
            golden = {key: value for key, value in golden.items() if key != "pred"}
        if "raises" in golden:
            assert score_one(task, protocol, item(case)) is None, case
        else:
            assert matches_golden(golden, verdict(task, protocol, item(case))), case


def test_yi_compares_the_response_with_the_letter_as_it_is():
    for case in CASES["choice"]:
        scored = score_one("mmmu", "yi", item(case))
        assert scored and not scored.fallback, case
        assert scored.correct is case["official"]["eval_only_raw_correct"], case
    scored = score_one("mmmu", "yi", AnsweredItem(1, "multiple-choice", ["a", "b"], "A", None))
    assert scored and (scored.prediction, scored.correct, scored.fallback) == (None, False, False)


def test_yis_own_parser_reads_the_words_of_the_letter():
    for case in CASES["choice"]:
        scored = score_one("mmmu", "official", item(case))
        if scored and not scored.fallback:
            assert case["index2ans"][scored.prediction] == case["yi"]["pred_content"]


def test_strict_draws_nothing_and_reads_the_same():
    for case in CASES["choice"]:
        ours, official = (
            score_one("mmmu", "strict", item(case)),
            score_one("mmmu", "official", item(case)),
        )
        if ours and official:
            assert not ours.fallback
            assert ours.prediction == (None if official.fallback else official.prediction)
            assert ours.correct == (official.correct and not official.fallback)


def test_the_stream_of_fallbacks_is_one_draw_after_the_other():
    known = [item(case) for case in CASES["choice"] if "raises" not in case["official"]]
    stream = random.Random(42)
    scored = score_items("mmmu", "official", known)
    assert sum(one.fallback for one in scored) > 100
    for one_scored in scored:
        if one_scored.fallback:
            letters = [chr(65 + n) for n in range(len(one_scored.item.options))]
            assert one_scored.prediction == stream.choice(letters)
    assert scored == score_items("mmmu", "official", known, seed=42)
    assert scored != score_items("mmmu", "official", known, seed=43)


def test_the_recorded_stream_of_fallbacks_can_be_followed():
    """Half of the recorded run's cases are not here: they drew or did not. One way is left."""
    run, known = MMMU["seeded_run"], {case["case"]: case for case in CASES["choice"]}
    places = {random.Random(42).getstate()}
    for name, prediction in zip(run["cases"], run["preds"], strict=True):
        case = known.get(name)
        sizes = [len(case["all_choices"])] if case else range(2, 10)
        if case and case["official"]["pred"] != "random":
            assert prediction == case["official"]["pred"]
            continue
        draws = [draw(place, size) for place in places for size in sizes]
        drawn = {after for after, letter in draws if letter == prediction}
        places = drawn if case else places | drawn
        assert places, name
    assert len(places) == 1


def draw(place: tuple, size: int) -> tuple[tuple, str]:
    """Return where a stream is after a draw from `size` letters, and the letter."""
    stream = random.Random()
    stream.setstate(place)
    letter = stream.choice("ABCDEFGHI"[:size])
    return stream.getstate(), letter


def test_order_does_not_matter_where_nothing_is_drawn():
    for task, kind in (("mmmu", "choice"), ("mmmu", "open"), ("cmmmu", "cmmmu")):
        for protocol in SCORING_PROTOCOLS[task]:
            fine = [
                scored for case in CASES[kind] if (scored := score_one(task, protocol, item(case)))
            ]
            items = [scored.item for scored in fine if not scored.fallback]
            mixed = random.Random(1).sample(items, len(items))
            assert by_id(task, protocol, mixed) == by_id(task, protocol, items)


def by_id(
    task: str, protocol: str, items: list[AnsweredItem]
) -> dict[str | int, tuple[object, bool]]:
    """Return prediction and verdict of every item."""
    scored = score_items(task, protocol, items)
    return {one.item.id: (plain(one.prediction), one.correct) for one in scored}


RELEASED = [
    AnsweredItem(one["id"], one["type"], ["甲", "乙", "丙", "丁"], one["gold"], one["pred"])
    for one in AGGREGATION["cmmmu_yi_vl_34b_val"]["records"]
]


@pytest.mark.parametrize("protocol", SCORING_PROTOCOLS["cmmmu"])
def test_the_released_answers_of_yi_vl_34b_have_their_published_score(protocol):
    scored = score_items("cmmmu", protocol, RELEASED)
    records = AGGREGATION["cmmmu_yi_vl_34b_val"]["records"]
    assert [one.correct for one in scored] == [one["correct"] for one in records]
    assert Counter(one.item.type for one in scored if one.correct) == {
        "选择": 252,
        "判断": 50,
        "填空": 24,
    }


@pytest.mark.parametrize(
    ("response", "official", "strict"),
    [
        ("不正确", "对", "错"),
        ("不对", "对", "错"),
        ("这个说法不准确。", "对", "错"),
        ("该陈述不完全正确", "对", "错"),
        ("这个说法不是正确的", "对", "错"),
        ("答案：不太对", "对", "错"),
        ("正确", "对", "对"),
        ("错误", "错", "错"),
        ("没错", "错", "错"),
        ("不合适", "错", "错"),
        ("不知道是不是正确", "对", "对"),
        ("是否正确", "random", None),
        ("不知道", "random", None),
        ("正确。不对。", "对", "错"),
        ("结果正确。结果不对。", "对", None),
    ],
)
def test_what_is_denied_is_wrong_in_strict(response, official, strict):
    asked = AnsweredItem(1, "判断", [], "错", response)
    assert verdict("cmmmu", "official", asked)[0] == official
    scored = score_one("cmmmu", "strict", asked)
    assert scored and not scored.fallback and scored.prediction == strict


@pytest.mark.parametrize(
    ("task", "kind", "answer", "response", "right"),
    [
        ("mmmu", "multiple-choice", "B", "B", True),
        ("mmmu", "multiple-choice", "B", "B.", False),
        ("mmmu", "multiple-choice", "B", "", False),
        ("mmmu", "open", "Paris", " paris", True),
        ("mmmu", "open", ["1,000", "x"], "1000.001", True),
        ("mmmu", "open", "Paris", "It is Paris", False),
        ("cmmmu", "选择", "AC", "AC", True),
        ("cmmmu", "选择", "AC", "A、C", False),
        ("cmmmu", "判断", "错", "错", True),
        ("cmmmu", "判断", "错", "错误", False),
        ("cmmmu", "填空", "3.5", "3.50", True),
        ("cmmmu", "填空", "北京", "北京市", False),
    ],
)
def test_raw_takes_the_answer_and_not_a_word_more(task, kind, answer, response, right):
    options = ["one", "two", "three", "four"]
    scored = score_one(task, "raw", AnsweredItem(1, kind, options, answer, response))
    assert scored and scored.correct is right and not scored.fallback
