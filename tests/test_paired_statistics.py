"""Statistics: intervals, exact tests, clusters and detectable differences keep what they promise.

The whole table is measured by benchmarks/simulate_comparison.py; here are its corner cases.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, polygamma

from vlbench.compare.report.detectable_difference import (
    UNDETECTABLE,
    PairUncertainty,
    PlannedDesign,
    describe_detectable,
    smallest_detectable,
)
from vlbench.compare.report.paired_statistics import (
    PairedDifference,
    RowStatistics,
    holm_correction,
)
from vlbench.compare.report.proportion_interval import score_interval, sign_test
from vlbench.compare.report.question_clusters import (
    cluster_values,
    effective_clusters,
    number_clusters,
)
from vlbench.compare.report.seed_variance import SeedVariances, inverse_trigamma

QUESTIONS = 400


def answers(rng, rows, seeds, questions=QUESTIONS, level=0.5, spread=0.3, turns=1, picture=0.0):
    """Return answers of equal rows; `turns` questions each share a row's own `picture` effect."""
    pictures = questions // turns
    base = rng.normal(level, 1.5, questions)
    own = np.repeat(rng.normal(0, picture, (rows, 1, pictures)), turns, axis=2)
    of_seed = rng.normal(0, spread, (rows, seeds, 1))
    return (rng.random((rows, seeds, questions)) < expit(base + own + of_seed)) * 1.0


def compare_two(first: np.ndarray, second: np.ndarray) -> PairedDifference:
    """Return the difference of two rows, `[seeds, questions]` each."""
    return RowStatistics(np.stack([first, second])).difference(0, 1)


def count_alarms(trials: list[RowStatistics]) -> int:
    """Return in how many families of rows a pair is significant."""
    alarms = 0
    for one in trials:
        pairs = [(i, j) for i in range(one.row_count) for j in range(i)]
        alarms += min(holm_correction([one.difference(*p).p_value for p in pairs])) < 0.05
    return alarms


@pytest.mark.parametrize(("seeds", "spread"), [(3, 0.0), (3, 0.3), (3, 1.0), (10, 0.1)])
def test_intervals_of_equal_rows_cover_and_raise_few_alarms(seeds, spread):
    rng = np.random.default_rng(seeds)
    trials = [RowStatistics(answers(rng, 4, seeds, spread=spread)) for _ in range(200)]
    pairs = [(i, j) for i in range(4) for j in range(i)]
    found = [one.difference(*pair) for one in trials for pair in pairs]
    covered = np.mean([one.interval_low <= 0 <= one.interval_high for one in found])
    assert 0.93 <= covered <= 0.995 and count_alarms(trials) <= 14  # 6 %, and two deviations


@pytest.mark.parametrize(("seeds", "spread"), [(1, 0.0), (3, 0.1)])
def test_turns_about_one_picture_are_not_independent(seeds, spread):
    rng = np.random.default_rng(7)
    kind = {"spread": spread, "turns": 8, "picture": 1.0}
    drawn = [answers(rng, 2, seeds, **kind) for _ in range(200)]
    clusters = np.repeat(np.arange(QUESTIONS // 8), 8)
    assert count_alarms([RowStatistics(one, clusters) for one in drawn]) <= 16
    if seeds == 1:
        assert count_alarms([RowStatistics(one) for one in drawn]) >= 24


def test_a_cluster_of_one_question_is_the_question_and_names_do_not_matter():
    correct = answers(np.random.default_rng(0), 2, 3)
    assert np.array_equal(cluster_values(correct, np.arange(QUESTIONS)), correct)
    names = [f"picture {number % 50}" for number in range(QUESTIONS)]
    shuffled = np.random.default_rng(1).permutation(QUESTIONS)
    one = RowStatistics(correct, number_clusters(names))
    other = RowStatistics(correct[..., shuffled], number_clusters([names[i] for i in shuffled]))
    assert one.difference(0, 1).interval_low == pytest.approx(other.difference(0, 1).interval_low)
    assert cluster_values(correct, one.clusters).mean(-1) == pytest.approx(correct.mean(-1))


def test_a_single_cluster_proves_nothing():
    one = RowStatistics(np.stack([np.ones((1, 9)), np.zeros((1, 9))]), np.zeros(9, int))
    found = one.difference(0, 1)
    assert found.p_value == 1 and found.interval_low < 0


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize(("seeds", "questions"), [(1, 1), (1, 20), (2, 1), (3, 20), (3, 1)])
def test_answers_all_alike_leave_an_interval(share, seeds, questions):
    both = RowStatistics(np.full((2, seeds, questions), share))
    mean, low, high = both.accuracy_interval(0)
    assert mean == share and low <= share <= high and high - low >= 1 / (questions + 1)
    found = both.difference(0, 1)
    assert found.p_value == 1 and found.interval_low < 0 < found.interval_high


@pytest.mark.parametrize("questions", [1, 5])
def test_few_answers_are_no_proof(questions):
    found = compare_two(np.ones((1, questions)), np.zeros((1, questions)))
    assert found.p_value > 0.05
    assert found.interval_low < 1 and found.p_value >= 2 * 0.5**questions
    found = compare_two(np.ones((3, questions)), np.zeros((3, questions)))
    assert found.p_value >= 2 * 0.5**questions


def test_no_interval_is_narrower_than_the_noise_of_its_answers():
    rng = np.random.default_rng(3)
    for _ in range(50):
        correct = (rng.random((1, 3, 300)) < 0.2) * 1.0
        mean, low, high = RowStatistics(correct).accuracy_interval(0)
        assert high - low >= 2 * 1.96 * np.sqrt(mean * (1 - mean) / 900) * 0.98


def test_known_values():
    assert sign_test(np.array([1.0] * 8 + [-1.0] + [0.0] * 9)) == pytest.approx(
        stats.binomtest(8, 9).pvalue
    )
    low, high = score_interval(0.9, 100, stats.norm.ppf(0.975))
    known = stats.binomtest(90, 100).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((known.low, known.high))
    assert holm_correction([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    for x in (0.7, 3.0, 200.0):
        assert inverse_trigamma(float(polygamma(1, x))) == pytest.approx(x, rel=0.01)


def variances(between: list[float], seeds: int = 3, noise: float = 1e-3) -> SeedVariances:
    """Return seed variances of rows with some mean squares."""
    return SeedVariances(np.array(between), np.full(len(between), noise), seeds, 1000)


def test_rows_lend_each_other_what_they_know_of_seeds():
    calm = variances([1.0, 1.0, 1.0, 1.0]).variance_of_sum((0, 1), 0.0)
    alone = variances([1.0, 1.0]).variance_of_sum((0, 1), 0.0)
    assert calm.degrees_of_freedom > alone.degrees_of_freedom
    lucky = variances([0.01, 1.0, 1.0, 1.0])
    assert lucky.variance_of_sum((0,), 0.0).variance > 5 * 0.01 / 3000  # squeezed upwards
    noisy = variances([9.0, 1.0, 1.0, 1.0])
    assert noisy.variance_of_sum((0,), 0.0).variance > 2 * noisy.variance_of_sum((1,), 0.0).variance
    assert calm.seed_share > 0.99 > variances([1e-3] * 4).variance_of_sum((0, 1), 0.0).seed_share


def uncertain(pairs: int, degrees: float = 8.0) -> PairUncertainty:
    """Return how well a pair of a comparison with so many pairs is known."""
    return PairUncertainty(0.01, degrees, 0.7, 0.9, pairs, 1200, 3)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("pairs", "degrees"), [(2, 15.0), (4, 39.0)])
def test_a_detectable_difference_is_found_without_warnings(pairs: int, degrees: float):
    assert 0.02 < smallest_detectable(uncertain(pairs, degrees)) < 0.05


def test_the_detectable_difference_is_that_of_the_whole_comparison():
    assert smallest_detectable(uncertain(1)) < smallest_detectable(uncertain(6))
    assert smallest_detectable(uncertain(6)) < smallest_detectable(uncertain(28))
    assert smallest_detectable(uncertain(6, 1e6)) < smallest_detectable(uncertain(6))
    design = PlannedDesign(4, 1200, 0.9, 0.02)
    found = [design.detectable_with(count) for count in (3, 5, 10)]
    assert found == sorted(found, reverse=True) and 0.02 < found[2] < found[0] < 0.3
    assert PlannedDesign(4, 5, 0.9, 0.02).detectable_with(1) > 0.9


@pytest.mark.parametrize("questions", [1, 2, 5])
def test_what_so_few_questions_never_show_is_told_without_the_distribution(questions):
    """It has one degree of freedom there: scipy warns of series, and takes seconds."""
    pair = PairUncertainty(0.3, 1.0, 0.5, 0.0, 4950, questions, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert smallest_detectable(pair) == 1.0


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_picture_with_half_of_all_questions_raises_no_false_alarms(seeds):
    """Its answers decide what is better, and of one picture nothing is known: 20 % were false."""
    rng = np.random.default_rng(4)
    pictures = np.r_[np.zeros(60, int), np.arange(1, 61)]
    false, covered = 0, 0
    for _ in range(300):
        own = (rng.random((2, 1, 61)) < 0.5)[..., pictures]  # what a row sees in a picture
        answer = rng.random((2, seeds, 120)) < 0.5
        correct = np.where(rng.random((2, seeds, 120)) < 0.5, own, answer) * 1.0
        found = RowStatistics(correct, pictures).difference(0, 1)
        covered += found.interval_low <= 0 <= found.interval_high
        false += found.p_value <= 0.05
    assert false <= 0.08 * 300 and covered >= 0.92 * 300
    assert effective_clusters(pictures) < 4 and effective_clusters(np.arange(6) // 2) == 3


@pytest.mark.parametrize("seeds", [3, 10])
@pytest.mark.parametrize("per_picture", [1, 4])
def test_seeds_and_questions_about_a_picture_make_no_more_pictures(seeds, per_picture):
    """Five pictures that are all won have p = 1 / 16: nothing can be found with them."""
    correct = np.stack([np.ones((seeds, 5 * per_picture)), np.zeros((seeds, 5 * per_picture))])
    correct[:, 0, 0] = 1 - correct[:, 0, 0]
    found = RowStatistics(correct, np.arange(5 * per_picture) % 5).difference(0, 1)
    assert found.p_value >= 1 / 16 and found.smallest_detectable == UNDETECTABLE
    designs = [PlannedDesign(2, pictures, 0.5, 0.01) for pictures in (5, 7)]
    never, seldom = (design.detectable_with(seeds) for design in designs)
    assert never == UNDETECTABLE and 0.7 < seldom < 1
    assert describe_detectable(designs[0], [seeds]) == f"none with {seeds} seeds"


def test_scores_in_tenths_that_add_up_alike_are_a_tie():
    """The scores of the VQA challenge: 0.3 + 0.6 - 0.9 is 1e-16 away from 0."""
    first, second = np.array([0.3, 0.6, 0.0]), np.array([0.9, 0.0, 0.0])
    assert (first - second).sum() != 0
    pictures = np.repeat(np.arange(25), 3)
    correct = [np.r_[np.ones(15), np.tile(first, 20)], np.r_[np.zeros(15), np.tile(second, 20)]]
    found = RowStatistics(np.array(correct)[:, None], pictures).difference(0, 1)
    assert found.p_value == pytest.approx(1 / 16)  # five pictures are won, and twenty a tie


def test_a_pair_that_differs_by_the_printed_difference_is_mostly_found():
    rng = np.random.default_rng(5)
    equal = [RowStatistics(answers(rng, 4, 3, 1200, 0.0)) for _ in range(40)]
    printed = np.mean([one.difference(0, 1).smallest_detectable for one in equal])
    found = 0
    for _ in range(150):
        base = rng.normal(0.0, 1.5, 1200)
        shift = printed * np.array([0.5, -0.5, 0, 0]) / 0.17  # the slope of accuracy at this level
        level = base + shift[:, None, None] + rng.normal(0, 0.3, (4, 3, 1))
        one = RowStatistics((rng.random((4, 3, 1200)) < expit(level)) * 1.0)
        pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
        corrected = holm_correction([one.difference(*pair).p_value for pair in pairs])
        found += corrected[0] <= 0.05
    assert 0.68 <= found / 150 <= 0.95


def test_a_large_difference_is_found_and_said():
    rng = np.random.default_rng(0)
    level = rng.normal(0.5, 1.5, QUESTIONS) + rng.normal(0, 0.1, (2, 5, 1))
    correct = (rng.random((2, 5, QUESTIONS)) < expit(level + [[[1.0]], [[0.0]]])) * 1.0
    found = RowStatistics(correct).difference(0, 1)
    assert found.p_value < 0.01 and found.smallest_detectable < 0.2
    text = found.describe_difference("llava_mlp", "qformer")
    low, high = 100 * found.interval_low, 100 * found.interval_high
    assert text.startswith(f"llava_mlp is {100 * found.mean:.1f} points above qformer (95 % ")
    back = RowStatistics(correct).difference(1, 0)
    assert back.interval_low == pytest.approx(-found.interval_high)
    said = back.describe_difference("qformer", "llava_mlp")
    assert f"below llava_mlp (95 % interval {low:.1f} to {high:.1f}; 5 seeds" in said


def test_one_seed_is_said_of_two_runs():
    found = compare_two(np.ones((1, 50)), np.zeros((1, 50)))
    said = found.describe_difference("a", "b")
    assert said.startswith("this run of a is 100.0 points above that run of b") and "1 seed" in said
    assert RowStatistics(np.ones((1, 1, 5))).seed_spread is None


def test_detectable_differences_of_many_alike_pairs_are_solved_once(monkeypatch):
    """A comparison of 300 rows has 45,000 pairs, in a dozen tables."""
    calls = []
    real = stats.nct.sf
    monkeypatch.setattr(stats.nct, "sf", lambda *words: calls.append(1) or real(*words))
    rows = RowStatistics(answers(np.random.default_rng(3), 40, 3))
    pairs = [rows.difference(i, j) for i in range(40) for j in range(i)]
    assert all(0 < one.smallest_detectable <= 1 for one in pairs)
    assert len(calls) < 3 * len(pairs)  # each would take about 13


def test_few_pictures_make_a_detectable_difference_a_rough_figure():
    few, many = (PlannedDesign(2, count, 0.8, 0.01) for count in (15, 400))
    assert describe_detectable(few).startswith("about ") and "about" not in describe_detectable(
        many
    )
