"""The language loss: at supervised positions alone, and the fused one equal to the plain one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from vlbench.data.sample import IGNORE
from vlbench.model import loss
from vlbench.model.loss import can_fuse, summed_loss


def case() -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(32, 200, bias=False)
    hidden = torch.randn(2, 50, 32, requires_grad=True)
    labels = torch.randint(0, 200, (2, 50))
    labels[:, ::3] = IGNORE
    return head, hidden, labels


def gradients(fused: bool, monkeypatch) -> list[torch.Tensor]:
    monkeypatch.setattr(loss, "FUSED_FROM", 1 if fused else 1 << 60)
    head, hidden, labels = case()
    total = summed_loss(head, hidden, labels)
    total.backward()
    return [total.detach(), head.weight.grad, hidden.grad]


def test_it_is_the_sum_over_supervised_positions(monkeypatch):
    head, hidden, labels = case()
    whole = cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(summed_loss(head, hidden, labels), whole)


@pytest.mark.skipif(not can_fuse(), reason="this torch has no fused loss")
def test_the_fused_loss_has_the_same_value_and_gradients(monkeypatch):
    for one, other in zip(gradients(True, monkeypatch), gradients(False, monkeypatch), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_no_supervised_position_gives_zero_and_gradients(monkeypatch):
    for fused in (False, True):
        monkeypatch.setattr(loss, "FUSED_FROM", 1 if fused else 1 << 60)
        head, hidden, labels = case()
        total = summed_loss(head, hidden, torch.full_like(labels, IGNORE))
        total.backward()
        assert total == 0 and head.weight.grad is not None
