"""Probes and neighbourhoods on features of which the truth is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vlbench.evaluate.linear_probe import ProbeSpace
from vlbench.evaluate.neighbour_overlap import neighbour_overlap


def random_features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labelled_features(count: int, width: int, seed: int = 0) -> tuple[Tensor, list[str]]:
    """Return features `[count, 4, width]` in which one of three values is written, and the values.

    The same value is written in the same way for every seed.
    """
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(3, (count,), generator=generator)
    written = one_hot(codes, 3).float() @ random_features(3, 4 * width, seed=99)
    noise = torch.randn(count, 4 * width, generator=generator)
    return (written + noise).unflatten(1, (4, width)), ["abc"[code] for code in codes]


def share_read(values: list[str], truth: list[str]) -> float:
    return sum(one == other for one, other in zip(values, truth, strict=True)) / len(truth)


@pytest.mark.parametrize("width", [3, 300])
def test_what_is_written_is_read_and_exchanged_labels_are_not(width):
    """In features narrower than there are pictures, and in wider ones."""
    (features, values), (seen, truth) = (labelled_features(300, width, seed) for seed in (1, 2))
    space = ProbeSpace(features)
    probe = space.fit_label(values)
    similarity = space.similarity(seen)
    assert share_read(probe.read(similarity), truth) > 0.9
    assert probe.training_accuracy == pytest.approx(
        share_read(probe.read(similarity), truth), abs=0.08
    )
    exchanged = [values[at] for at in torch.randperm(300, generator=torch.Generator()).tolist()]
    assert share_read(space.fit_label(exchanged).read(similarity), truth) < 0.5


def test_what_is_not_written_is_not_read():
    (_, values), (_, truth) = (labelled_features(300, 30, seed) for seed in (1, 2))
    space = ProbeSpace(random_features(300, 120))
    probe = space.fit_label(values)
    read = probe.read(space.similarity(random_features(300, 120, seed=5)))
    assert 0.2 < share_read(read, truth) < 0.47 and probe.training_accuracy < 0.5


def test_cross_validation_is_that_of_a_probe_fitted_anew_without_each_picture():
    features, values = labelled_features(40, 2)
    truth = torch.tensor(["abc".index(value) for value in values])
    space, targets = ProbeSpace(features), one_hot(truth, 3).double()
    rotated = space._eigenvectors.T @ (targets - targets.mean(0))
    scores = space._left_out(targets, rotated, 0.1)
    standard = space._training.double()
    for left_out in range(len(values)):
        kept = [at for at in range(len(values)) if at != left_out]
        x, y = standard[kept], targets[kept]
        centred = x - x.mean(0)
        ridge = space._strength(0.1) * torch.eye(x.shape[1], dtype=torch.float64)
        weights = torch.linalg.solve(centred.T @ centred + ridge, centred.T @ (y - y.mean(0)))
        expected = (standard[left_out] - x.mean(0)) @ weights + y.mean(0)
        assert torch.allclose(scores[left_out], expected, atol=1e-5)


def test_features_that_do_not_change_and_their_rounding_say_nothing():
    features, values = labelled_features(200, 5, 1)
    seen, truth = labelled_features(200, 5, 2)
    plain = ProbeSpace(features)
    expected = plain.fit_label(values).read(plain.similarity(seen))
    noise = 100 + 1e-5 * random_features(200, 4, 400)
    space = ProbeSpace(torch.cat([features, noise], 2))
    assert space.fit_label(values).read(space.similarity(torch.cat([seen, noise], 2))) == expected
    constant = ProbeSpace(torch.ones(50, 3))
    most = constant.fit_label(["a"] * 30 + ["b"] * 20).read(constant.similarity(torch.ones(2, 3)))
    assert most == ["a", "a"]


def test_neighbourhoods_are_kept_lost_or_partly_kept():
    before = random_features(60, 4, 8)
    turned = torch.linalg.qr(random_features(8, 8, seed=1)).Q
    assert neighbour_overlap(before, before @ turned + 3).tolist() == [1.0] * 60
    unrelated = neighbour_overlap(before, random_features(60, 1, 8, seed=2))
    assert float(unrelated.mean()) == pytest.approx(10 / 59, abs=0.06)
    some = neighbour_overlap(before, before[..., :4])
    assert float(unrelated.mean()) + 0.1 < float(some.mean()) < 0.9


def test_a_picture_is_not_its_own_neighbour():
    line = torch.tensor([0.0, 1, 2.1, 3.3])[:, None, None]
    swapped = torch.tensor([0.0, 5, 2.1, 3.3])[:, None, None]
    # the nearest of 0, 1, 2.1, 3.3: 1, 0, 1, 2; with the second moved: 2, 3, 3, 2
    assert neighbour_overlap(line, swapped, count=1).tolist() == [0, 0, 0, 1]
