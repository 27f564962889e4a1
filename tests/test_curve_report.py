"""Curves in a report: what is tested, where curves cross, which row is best at each budget."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from vlbench.__main__ import main
from vlbench.compare.report.curve_analysis import CurveFindings, analyze_curves
from vlbench.compare.report.curve_crossings import find_undecided
from vlbench.compare.report.curve_plan import (
    CurvePlan,
    CurvePoint,
    format_budget,
    write_curve_plan,
)
from vlbench.compare.report.curve_sentences import all_sentences, verdict_sentence
from vlbench.compare.report.paired_statistics import RowStatistics
from vlbench.compare.report.row_pairs import compare_pairs
from vlbench.config import recipe as recipes

STEEP, FLAT = (0.55, 0.75, 0.95), (0.72, 0.74, 0.76)
CROSSING = 14.8  # of the straight lines over the log budget


def answers(accuracies: list[float], seeds: int = 3, questions: int = 600) -> np.ndarray:
    rng = np.random.default_rng(7)
    drawn = rng.random((len(accuracies), seeds, questions))
    return (drawn < np.array(accuracies)[:, None, None]).astype(float)


def plan_of(*curves: str, budgets: tuple[int, ...] = (4, 16, 64)) -> CurvePlan:
    points = [CurvePoint(name, one, one, f"{name}/{one}") for name in curves for one in budgets]
    return CurvePlan("visual_tokens", tuple(points))


def found_of(plan: CurvePlan, accuracies: list[float], **design: int) -> CurveFindings:
    statistics = RowStatistics(answers(accuracies, **design))
    names = [point.name for point in plan.points]
    tested = compare_pairs(names, statistics, plan.number_pairs(names, plan.tested_pairs()))
    return analyze_curves(plan, names, statistics, tested, [])


def test_a_contrast_of_two_rows_is_their_difference():
    statistics = RowStatistics(answers([*STEEP, *FLAT]))
    weights = np.array([1.0, 0, 0, -1.0, 0, 0])
    mean, half = statistics.contrast(weights)
    pair = statistics.difference(0, 3)
    assert mean == pytest.approx(pair.mean)
    assert half == pytest.approx((pair.interval_high - pair.interval_low) / 2)
    general = statistics._seed_variances.variance_of_contrast(weights, 1e-5)
    exact = statistics._seed_variances.variance_of_sum([0, 3], 1e-5)
    assert general.variance == pytest.approx(exact.variance, rel=0.05)
    assert general.degrees_of_freedom == pytest.approx(exact.degrees_of_freedom, rel=0.25)
    middle = np.array([0.5, 0.5, 0, -0.5, -0.5, 0])
    assert statistics.contrast(middle)[1] < half  # a mean of independent rows is known better


def test_the_interval_of_a_crossing_holds_it_and_grows_where_curves_are_flat():
    steep = found_of(plan_of("a", "b"), [*STEEP, *FLAT]).curve_pairs[0]
    (crossing,) = [one for one in steep.undecided if one.crossings]
    assert (
        crossing.low < 14.9 < crossing.high and crossing.is_bounded and steep.is_certain(crossing)
    )
    assert crossing.first_rises and steep.better_at(4) == "b" and steep.better_at(64) == "a"
    flat = [0.70, 0.72, 0.74, 0.71, 0.72, 0.73]
    for one in found_of(plan_of("a", "b"), flat).curve_pairs[0].undecided:
        assert (one.reaches_start and one.reaches_end) or one.high / one.low > 4


def test_a_crossing_exactly_at_a_budget_is_found_once():
    correct = np.zeros((6, 2, 400))
    for row, right in enumerate((100, 200, 300, 200, 200, 200)):
        correct[row, :, :right] = 1
    found = find_undecided(RowStatistics(correct), (0, 1, 2), (3, 4, 5), (4, 16, 64))
    assert [one.crossings for one in found] == [(pytest.approx(16.0),)]


def test_sentences_say_what_is_certain_and_what_may_be_chance():
    said = verdict_sentence(found_of(plan_of("a", "b"), [*STEEP, *FLAT]))
    assert re.fullmatch(
        r"a overtakes b at 1\d\.\d visual tokens \(95 % interval [\d.]+ to [\d.]+\)\.", said
    )
    apart = found_of(plan_of("a", "b"), [0.5, 0.6, 0.7, 0.7, 0.8, 0.9])
    assert verdict_sentence(apart) == (
        "b is above a at all budgets from 4 to 64 visual tokens, "
        "by more than chance at 4, 16 and 64."
    )
    alike = verdict_sentence(found_of(plan_of("a", "b"), [0.7, 0.7, 0.71, 0.7, 0.71, 0.7]))
    assert "cannot tell" in alike or "not told apart" in alike or "by no more than chance" in alike
    alone = found_of(plan_of("a", "b"), [*STEEP, *FLAT], seeds=1)
    assert verdict_sentence(alone).endswith("With one seed this is about these runs alone.")


def test_one_curve_is_a_ladder_whose_steps_are_tested():
    plan = plan_of("a")
    found = found_of(plan, [0.5, 0.7, 0.9])
    (said,) = all_sentences(found)
    assert said.startswith(
        "a rises over visual tokens at every step, each by more than chance: 4 to 16 +"
    )
    assert said.endswith("p after Holm's correction over 2 tests.")
    assert [step.pair.pair_count for step in found.curves[0].steps] == [2, 2]
    (said,) = all_sentences(found_of(plan, [0.5, 0.7, 0.6]))
    assert "does not rise over visual tokens at every step" in said and "16 to 64 -" in said


def test_a_frontier_keeps_all_rows_that_may_be_best():
    found = found_of(plan_of("a", "b"), [0.5, 0.9, 0.9, 0.8, 0.8, 0.8])
    at_4, at_16, at_64 = found.frontiers[0].cells
    assert (at_4.best, at_4.may_be_best) == ("b at 4", ())
    assert (at_16.best, at_16.may_be_best) == ("a at 16", ())
    assert {at_64.best, *at_64.may_be_best} == {"a at 16", "a at 64"}  # the cheaper one may be it


def test_budgets_are_written_as_they_are_read():
    assert [format_budget(one) for one in (4, 9999, 16.04, 1.5e9, 123456, 3.14159)] == [
        "4", "9,999", "16", "1.5G", "123.5k", "3.14",
    ]  # fmt: skip


def make_run(folder: Path, chance: float, seed: int, *words: str) -> None:
    folder.mkdir(parents=True)
    recipe = recipes.load_recipe(["recipe=yivl_llava", f"seed={seed}", f"run={folder}", *words])
    recipes.save_recipe(recipe, folder / "recipe.yaml")
    rng = random.Random(f"{seed} {words}")
    lines = [
        {
            "set": "accuracy",
            "id": f"q{number}",
            "type": ("shape", "colour")[number % 2],
            "language": "en",
            "correct": rng.random() < chance,
        }
        for number in range(300)
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "results.json").write_text(json.dumps({"seconds": 60.0, "budget": {"tokens": seed}}))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> Path:
    """A comparison of two connectors at three budgets, and a run that is of no curve."""
    home = tmp_path_factory.mktemp("curves") / "c"
    points = []
    for connector, option, sizes, accuracies in (
        ("avgpool", "pool", (4, 2, 1), STEEP),
        ("qformer", "queries", (4, 16, 64), FLAT),
    ):
        for tokens, size, accuracy in zip((4, 16, 64), sizes, accuracies, strict=True):
            row = f"yivl_{connector}/visual_tokens={tokens}"
            points.append(CurvePoint(connector, tokens, tokens, row))
            for seed in (0, 1, 2):
                words = (f"connector.name={connector}", f"connector.{option}={size}")
                make_run(home / row / f"seed{seed}", accuracy, seed, *words)
    make_run(home / "linear/visual_tokens=64/seed0", 0.5, 0, "connector.name=linear")
    write_curve_plan(CurvePlan("visual_tokens", tuple(points)), home)
    return home


def test_every_form_of_the_report_has_the_curves_and_no_other_pairs(comparison, tmp_path, capsys):
    files = [tmp_path / f"r.{suffix}" for suffix in ("md", "html", "json")]
    assert main(["report", str(comparison), *(f"out={file}" for file in files)]) == 0
    capsys.readouterr()
    markdown, page, record = (file.read_text() for file in files)
    found = json.loads(record)
    assert len(found["pairs"]) == 3 and {pair["tests_in_family"] for pair in found["pairs"]} == {3}
    for pair in found["pairs"]:
        assert pair["better"].split(" at ")[1] == pair["worse"].split(" at ")[1]
    sentence = next(one for one in found["curves"]["sentences"] if "overtakes" in one)
    assert "avgpool overtakes qformer at" in sentence and sentence in found["verdict"]
    for text in (markdown, page):
        assert sentence in text and "95 % interval" in sentence
        assert "at each budget the rows that have it against each other (3 tests)" in text
        assert "curve's steps from a budget to the next (4 tests)" in text.replace("&#39;", "'")
        assert "Left out, because they are points of none of the curves: " in text
        assert "Not matched" not in text
    assert markdown.count("- avgpool at ") + markdown.count("- qformer at ") == 3
    (range_found,) = [
        one for one in found["curves"]["pairs"][0]["not_told_apart"] if one["crossings_of_means"]
    ]
    assert range_found["overtaking"] == "avgpool" and range_found["more_than_chance"]
    kinds = [one["questions"] for one in found["curves"]["frontiers"]]
    assert kinds[0] == "all" and {"shape", "colour"} <= set(kinds)


def test_the_page_draws_the_curves_wide_and_narrow(comparison, tmp_path, capsys):
    assert main(["report", str(comparison), f"out={tmp_path / 'r.html'}"]) == 0
    page = (tmp_path / "r.html").read_text()
    for name in ("plot-curves", "plot-curves-kinds"):
        assert f'<svg id="{name}" class="wide"' in page
        assert f'<svg id="{name}-narrow" class="narrow"' in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {one[1:] for one in re.findall(r'href="(#[^"]*)"', page)} <= set(ids)
    assert page.index('href="#curves"') < page.index('href="#accuracy"')


def test_a_part_of_the_runs_is_a_part_of_the_curves(comparison, capsys):
    assert main(["report", str(comparison / "yivl_avgpool")]) == 0
    said = capsys.readouterr().out
    assert "avgpool rises over visual tokens at every step, each by more than chance" in said
    assert "- avgpool at 16 is" in said and "over 2 pairs" in said and "qformer" not in said


def test_runs_of_a_point_that_differ_are_named(comparison, tmp_path, capsys):
    folder = comparison / "yivl_avgpool/visual_tokens=4/seed9"
    make_run(folder, 0.5, 9, "connector.name=avgpool", "connector.pool=2")
    try:
        assert main(["report", str(comparison)]) == 2
        assert "avgpool at 4 are not of the same recipe: they differ in connector.pool" in (
            capsys.readouterr().err
        )
    finally:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
