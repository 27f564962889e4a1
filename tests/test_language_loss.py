"""The language loss: at supervised positions alone, and in pieces equal to all at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from vlbench.data.sample_encoding import IGNORE_INDEX
from vlbench.model import language_loss
from vlbench.model.language_loss import summed_loss


def case(kind: torch.dtype = torch.float64) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(32, 200, bias=False, dtype=kind)
    hidden = torch.randn(2, 50, 32, requires_grad=True, dtype=kind)
    labels = torch.randint(0, 200, (2, 50))
    labels[:, ::3] = IGNORE_INDEX
    return head, hidden, labels


def learned(fused: bool, monkeypatch, kind: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Return the loss and its gradients, in pieces of 16 positions or all at once."""
    monkeypatch.setattr(language_loss, "MIN_FUSED_LOGITS", 1 if fused else 1 << 60)
    monkeypatch.setattr(language_loss, "CHUNK_POSITIONS", 16)
    head, hidden, labels = case(kind)
    total = summed_loss(head, hidden, labels)
    (total / 7).backward()
    return [total.detach(), head.weight.grad, hidden.grad]


def test_it_is_the_sum_over_supervised_positions():
    head, hidden, labels = case()
    whole = cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(summed_loss(head, hidden, labels).double(), whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_known_positions_change_nothing(fused, monkeypatch):
    monkeypatch.setattr(language_loss, "MIN_FUSED_LOGITS", 1 if fused else 1 << 60)
    head, hidden, labels = case()
    where = (labels.flatten() != IGNORE_INDEX).nonzero()[:, 0]
    assert summed_loss(head, hidden, labels) == summed_loss(head, hidden, labels, where)


def test_in_pieces_it_has_the_same_value_and_gradients(monkeypatch):
    pieces, whole = learned(True, monkeypatch), learned(False, monkeypatch)
    for one, other in zip(pieces, whole, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-6)


def test_under_autocast_the_sum_is_as_exact_as_at_once(monkeypatch):
    exact = learned(False, monkeypatch, torch.float32)
    found = {}
    for fused in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            found[fused] = learned(fused, monkeypatch, torch.float32)
    assert found[True][0].dtype == torch.float32
    assert found[True][0] == pytest.approx(float(found[False][0]), rel=1e-5)
    for one, other in zip(found[True][1:], exact[1:], strict=True):
        scale = other.abs().max()
        assert one.dtype == torch.float32 and (one - other).abs().max() < 0.02 * scale


def test_a_frozen_head_gets_no_gradient_and_passes_one_on(monkeypatch):
    monkeypatch.setattr(language_loss, "MIN_FUSED_LOGITS", 1)
    head, hidden, labels = case()
    head.requires_grad_(False)
    summed_loss(head, hidden, labels).backward()
    assert head.weight.grad is None and hidden.grad.abs().max() > 0


def test_without_gradients_it_is_the_same_number(monkeypatch):
    with torch.no_grad():
        monkeypatch.setattr(language_loss, "MIN_FUSED_LOGITS", 1)
        head, hidden, labels = case()
        pieces = summed_loss(head, hidden, labels)
        monkeypatch.setattr(language_loss, "MIN_FUSED_LOGITS", 1 << 60)
        torch.testing.assert_close(pieces.double(), summed_loss(head, hidden, labels).double())


@pytest.mark.parametrize("fused", [False, True])
def test_no_supervised_position_gives_zero_and_gradients(fused, monkeypatch):
    monkeypatch.setattr(language_loss, "MIN_FUSED_LOGITS", 0 if fused else 1 << 60)
    head, hidden, labels = case()
    total = summed_loss(head, hidden, torch.full_like(labels, IGNORE_INDEX))
    total.backward()
    assert total == 0 and not head.weight.grad.any()
