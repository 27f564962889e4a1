"""The training module's arithmetic."""

from __future__ import annotations

import pytest

from vlbench.train.module import learning_rate_factor


def test_the_rate_rises_to_its_peak_then_falls_to_nothing() -> None:
    factors = [learning_rate_factor(n, 100, 0.03, "cosine") for n in range(101)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert factors[3] == 1.0
    assert factors[3:] == sorted(factors[3:], reverse=True)
    assert factors[100] == pytest.approx(0.0)
    assert factors[51] == pytest.approx(0.5, abs=0.01)


def test_a_constant_schedule_stays_at_its_peak_after_the_warm_up() -> None:
    factors = [learning_rate_factor(n, 10, 0.2, "constant") for n in range(10)]
    assert factors == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_no_warm_up_starts_at_the_peak() -> None:
    assert learning_rate_factor(0, 10, 0.0, "cosine") == 1.0
