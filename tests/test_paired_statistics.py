"""Statistics: intervals cover known differences as often as they say, in thousands of trials."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

from vlbench.compare.report.paired_statistics import (
    accuracy_interval,
    bootstrap_interval,
    holm_correction,
    mean_squares,
    paired_difference,
)

QUESTIONS = 400
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(41)


def chance(level: np.ndarray | float, spread: float) -> np.ndarray:
    """Return the mean of expit(level + spread x normal)."""
    return (expit(np.asarray(level)[..., None] + spread * NODES) * WEIGHTS).sum(-1) / WEIGHTS.sum()


def trial(rng: np.random.Generator, seeds: int, spread: float, effect: float, hard: float = 1.5):
    """Return answers of two arms and the difference that is true over all seeds and questions."""
    levels = rng.normal(0.5, hard, QUESTIONS)
    arms = []
    for shift in (0.0, effect):
        of_seed = rng.normal(0, spread, (seeds, 1)) if spread else np.zeros((seeds, 1))
        arms.append((rng.random((seeds, QUESTIONS)) < expit(levels + shift + of_seed)) * 1.0)
    total = np.hypot(hard, spread)
    return arms[1], arms[0], float(chance(0.5 + effect, total) - chance(0.5, total))


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("spread", [0.0, 0.1, 0.3, 0.6, 1.0])
def test_intervals_cover_the_known_difference(seeds, spread):
    rng = np.random.default_rng(int(100 * spread) + seeds)
    for effect in (0.0, 0.4):
        covered = 0
        for _ in range(1000):
            one, other, truth = trial(rng, seeds, spread, effect)
            found = paired_difference(one, other)
            covered += found.interval_low <= truth <= found.interval_high
        assert 920 <= covered <= 995, (effect, covered)


@pytest.mark.parametrize(("seeds", "spread"), [(3, 0.0), (3, 0.3), (3, 1.0), (5, 0.6), (10, 0.1)])
def test_families_without_a_difference_raise_few_false_alarms(seeds, spread):
    rng = np.random.default_rng(seeds)
    alarms, families = 0, 1000
    for _ in range(families):
        levels = rng.normal(0.5, 1.5, QUESTIONS)
        arms = [
            (rng.random((seeds, QUESTIONS)) < expit(levels + rng.normal(0, spread, (seeds, 1))))
            * 1.0
            for _ in range(4)
        ]
        pairs = [(i, j) for i in range(4) for j in range(i)]
        alarms += (
            min(holm_correction([paired_difference(arms[i], arms[j]).p_value for i, j in pairs]))
            < 0.05
        )
    assert alarms <= 0.06 * families, alarms


@pytest.mark.parametrize("questions", [5, 20])
@pytest.mark.parametrize("level", [0.5, 3.0])
@pytest.mark.parametrize(("seeds", "spread"), [(2, 0.0), (2, 0.3), (3, 0.0), (3, 0.3)])
def test_few_questions_raise_few_false_alarms(seeds, spread, level, questions):
    rng = np.random.default_rng(questions + seeds)
    alarms, families = 0, 300
    for _ in range(families):
        levels = rng.normal(level, 1.5, questions)
        arms = [
            (rng.random((seeds, questions)) < expit(levels + rng.normal(0, spread, (seeds, 1))))
            * 1.0
            for _ in range(4)
        ]
        pairs = [(i, j) for i in range(4) for j in range(i)]
        alarms += (
            min(holm_correction([paired_difference(arms[i], arms[j]).p_value for i, j in pairs]))
            < 0.05
        )
    assert alarms <= 0.05 * families, alarms


@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.parametrize(("won", "lost"), [(1, 0), (2, 1), (3, 1)])
def test_seeds_that_agree_by_accident_on_different_questions_are_no_proof(seeds, won, lost):
    """The sums of the seeds are equal, and no question is won or lost twice."""
    one, other = np.zeros((seeds, 20)), np.zeros((seeds, 20))
    for seed in range(seeds):
        first = seed * (won + lost)
        one[seed, first : first + won] = 1
        other[seed, first + won : first + won + lost] = 1
    found = paired_difference(one, other)
    assert found.mean == pytest.approx((won - lost) / 20)
    assert found.p_value > 0.05 and found.interval_low < 0 < found.interval_high
    assert found.standard_error >= 1 / 20 / np.sqrt(seeds)


@pytest.mark.parametrize(("seeds", "questions"), [(1, 1), (1, 20), (2, 1), (3, 20), (3, 1)])
def test_answers_that_are_all_alike_are_known_to_one_answer_at_best(seeds, questions):
    right = np.ones((seeds, questions))
    mean, low, high = accuracy_interval(right)
    assert mean == high == 1 and low <= 1 - 1 / right.size
    mean, low, high = accuracy_interval(0 * right)
    assert mean == low == 0 and high >= 1 / right.size
    found = paired_difference(right, 0 * right)
    assert 1 / right.size <= found.standard_error <= 1.2 / questions and found.p_value > 0


def test_many_questions_do_not_notice_the_bound():
    one, other, _ = trial(np.random.default_rng(4), 3, 0.3, 0.4)
    assert paired_difference(one, other).standard_error > 5 / QUESTIONS / np.sqrt(3)


def test_a_large_difference_is_found_and_said():
    rng = np.random.default_rng(0)
    one, other, truth = trial(rng, 5, 0.1, 1.0)
    found = paired_difference(one, other)
    assert (
        found.p_value < 0.01
        and found.interval_low < truth < found.interval_high
        and found.smallest_detectable < truth
    )
    text = found.describe_difference("llava_mlp", "qformer")
    assert text.startswith(
        f"llava_mlp is {100 * found.mean:.1f} points above qformer (95 % interval"
    )
    back = paired_difference(other, one)
    assert (back.mean, back.interval_low, back.interval_high) == pytest.approx(
        (-found.mean, -found.interval_high, -found.interval_low)
    )
    said = back.describe_difference("qformer", "llava_mlp")
    low, high = 100 * found.interval_low, 100 * found.interval_high
    assert f"below llava_mlp (95 % interval {low:.1f} to {high:.1f}" in said
    low, high = bootstrap_interval(one, other)
    assert low < found.mean < high


def test_no_difference_at_all_is_no_error():
    same = np.ones((3, 10))
    found = paired_difference(same, same)
    assert (found.mean, found.interval_low, found.interval_high, found.p_value) == (0, 0, 0, 1)
    assert "this may be chance" in found.describe_difference("a", "b")


def test_mean_squares_add_up():
    cells = np.random.default_rng(1).normal(size=(4, 30))
    parts = mean_squares(cells)
    whole = 3 * parts.seeds + 29 * parts.questions + 87 * parts.residual
    assert whole == pytest.approx(((cells - cells.mean()) ** 2).sum())


def test_seeds_that_happen_to_agree_do_not_blow_an_interval_up():
    rng = np.random.default_rng(3)
    wrong, values = np.zeros((3, 20)), np.repeat([1.0, 0.0], 10)
    for _ in range(100):
        right = np.array([rng.permutation(values) for _ in range(3)])  # each seed has 10 right
        found = paired_difference(right, wrong)
        assert found.degrees_of_freedom >= 1 and found.interval_high - found.interval_low < 1


def test_holm_is_the_known_example():
    assert holm_correction([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_a_single_seed_speaks_of_questions_alone():
    rng = np.random.default_rng(2)
    one, other, _ = trial(rng, 1, 0.0, 0.5)
    found = paired_difference(one, other)
    assert found.degrees_of_freedom == QUESTIONS - 1 and "; 1 seed" in found.describe_difference(
        "a", "b"
    )
    mean, low, high = accuracy_interval(one)
    assert low < mean < high and mean == one.mean()
