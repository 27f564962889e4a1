"""Shuffles are permutations, mixtures keep their weights, and both are pure functions."""

from __future__ import annotations

import math
import pickle
from collections import Counter

import pytest

from vlbench.data.sample import Sample
from vlbench.data.shuffle import FeistelShuffle, SourceMixture
from vlbench.errors import UserError


class Numbers:
    """A source of empty samples."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        return Sample(f"{self.name}{index}", ())


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 100, 1000, 4097])
def test_an_order_is_a_permutation(count):
    for seed in (0, 1, "text"):
        order = FeistelShuffle(count, seed)
        assert sorted(map(order, range(count))) == list(range(count))


def test_orders_differ_by_seed_and_look_shuffled():
    first, second = ([FeistelShuffle(10_000, seed)(n) for n in range(10_000)] for seed in (1, 2))
    assert first == [FeistelShuffle(10_000, 1)(n) for n in range(10_000)]
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 20
    mean = sum((n - 4999.5) * (value - 4999.5) for n, value in enumerate(first)) / 10_000
    assert abs(mean) / (10_000**2 / 12) < 0.05  # no correlation with the position
    steps = [abs(a - b) for a, b in zip(first, first[1:], strict=False)]
    assert 0.3 < sum(steps) / len(steps) / 10_000 < 0.37  # a third, as for random numbers


def test_a_huge_order_needs_no_list():
    order = FeistelShuffle(10**9, 7)
    seen = {order(position) for position in range(2000)}
    assert len(seen) == 2000 and all(0 <= index < 10**9 for index in seen)
    assert min(seen) < 10**7 and max(seen) > 10**9 - 10**7


@pytest.mark.parametrize("position", [-1, 5])
def test_positions_outside_are_refused(position):
    with pytest.raises(IndexError, match="of a permutation of 5"):
        FeistelShuffle(5, 0)(position)


def test_weights_say_how_often_a_sample_is_met():
    mixture = SourceMixture(
        [(Numbers("a", 10), 2), (Numbers("b", 20), 0.5), (Numbers("c", 7), 1)], 3
    )
    assert mixture.epoch_samples == len(mixture) == 20 + 10 + 7
    one, two = (Counter(mixture[epoch * 37 + n].id for n in range(37)) for epoch in range(2))
    assert {one[f"a{n}"] for n in range(10)} == {2} and {one[f"c{n}"] for n in range(7)} == {1}
    assert sum(one[f"b{n}"] for n in range(20)) == 10
    assert {(one + two)[f"b{n}"] for n in range(20)} == {1}  # the other half comes next


def test_epochs_and_seeds_have_their_own_orders():
    def stream(seed: int, positions: range) -> list[str]:
        mixture = SourceMixture([(Numbers("a", 50), 1), (Numbers("b", 50), 1)], seed)
        return [mixture[position].id for position in positions]

    assert stream(1, range(100)) == stream(1, range(100))
    assert stream(1, range(100)) != stream(2, range(100))
    assert stream(1, range(100)) != stream(1, range(100, 200))
    assert sorted(stream(1, range(100))) == sorted(stream(1, range(100, 200)))
    assert len({name[0] for name in stream(1, range(10))}) == 2  # mixed, not one after the other


def test_a_mixture_travels_to_a_worker():
    mixture = SourceMixture([(Numbers("a", 5), 1.5)], 0)
    copy = pickle.loads(pickle.dumps(mixture))
    assert [copy[n].id for n in range(20)] == [mixture[n].id for n in range(20)]


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ([], "at least one source"),
        ([(Numbers("a", 0), 1)], "'a' holds no samples"),
        ([(Numbers("a", 3), 0)], "weight is 0"),
        ([(Numbers("a", 3), -1)], "weight is -1"),
        ([(Numbers("a", 3), math.nan)], "weight is nan"),
    ],
)
def test_bad_mixtures_are_refused(sources, words):
    with pytest.raises(UserError, match=words):
        SourceMixture(sources, 0)
