"""Looking at one's own image: by a kernel or one by one, and nothing is asked of the device."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from random_vlm import SMALL, make_batch, make_sample, open_gates, small_vlm
from torch import Tensor

from vlbench.connector import registry
from vlbench.model import cross_attention
from vlbench.model.cross_attention import ImageSegments, attend_to_images, find_segments

Attention = Callable[..., Tensor]
NONE_BETWEEN = [[-1, 0, 0, 2, 2, 2], [-1, -1, 3, 3, 3, -1]]  # nobody sees image 1


def kernel(
    query: Tensor, key: Tensor, value: Tensor, begins: Tensor, of_keys: Tensor, *_: int
) -> Tensor:
    """Do what torch's variable-length kernel promises, group by group."""
    outs = []
    for group in range(len(begins) - 1):
        q = query[begins[group] : begins[group + 1]]
        k, v = (one[of_keys[group] : of_keys[group + 1]] for one in (key, value))
        scores = torch.einsum("qhw,khw->hqk", q, k) / q.shape[-1] ** 0.5
        outs.append(torch.einsum("hqk,khw->qhw", scores.softmax(-1), v))
    return torch.cat(outs)


def gradients(
    sees: Tensor, bounds: Tensor | None = None, attend: Attention = attend_to_images, heads: int = 2
) -> list[Tensor]:
    """Return what attention gives, and the gradients of its query, key and value."""
    drawn = torch.Generator().manual_seed(0)
    views = 4 if bounds is None else int(bounds[-1])
    query = torch.randn(*sees.shape, 2, 8, generator=drawn, requires_grad=True)
    key, value = (
        torch.randn(views, 3, heads, 8, generator=drawn, requires_grad=True) for _ in "kv"
    )
    out = attend(query, key, value, sees, bounds)
    weights = torch.randn(out.shape, generator=drawn)
    return [out, *torch.autograd.grad((out * weights).sum(), (query, key, value))]


def attend_by_position(
    query: Tensor, key: Tensor, value: Tensor, sees: Tensor, bounds: Tensor | None
) -> Tensor:
    """Let one position after the other look at the tokens of its image."""
    views = torch.arange(len(key) + 1) if bounds is None else bounds
    out = query * 0 + 0 * (key.sum() + value.sum())  # none may be looked at
    for row, column in (sees >= 0).nonzero().tolist():
        image = int(sees[row, column])
        own = slice(int(views[image]), int(views[image + 1]))
        for head in range(query.shape[2]):
            shared = head * key.shape[2] // query.shape[2]
            k, v = (one[own, :, shared].flatten(0, 1) for one in (key, value))
            weights = (k @ query[row, column, head] / query.shape[-1] ** 0.5).softmax(0)
            out[row, column, head] = weights @ v
    return out


VIEW_BOUNDS = [
    [0, 1, 2, 3, 4],
    [0, 3, 6, 9, 12],
    [0, 7, 8, 11, 18],
    [0, 1, 1 + 65, 2 + 65, 9 + 65],
]
"""Of four images: one view each, as many each, and others."""


@pytest.mark.parametrize("heads", [2, 1])
@pytest.mark.parametrize("bounds", VIEW_BOUNDS)
@pytest.mark.parametrize("sees", [NONE_BETWEEN, [[-1, -1]], [[0, 1, 2, 3]], [[3, 0, 0], [1, 0, 1]]])
def test_a_position_attends_to_all_views_of_its_image(sees, bounds, heads, monkeypatch):
    given = torch.tensor(sees), torch.tensor(bounds)
    expected = gradients(*given, attend_by_position, heads)
    for kind in ("one by one", "kernel"):
        if kind == "kernel":
            monkeypatch.setattr(cross_attention, "_has_kernel", lambda query: True)
            monkeypatch.setattr(cross_attention, "find_varlen_attention", lambda causal: kernel)
        found = gradients(*given, heads=heads)
        assert not found[0][given[0] < 0].any()
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("sees", [NONE_BETWEEN, [[0, 1, 2, 3]]])
def test_bounds_of_one_view_each_change_no_bit(sees):
    sees = torch.tensor(sees)
    pairs = zip(gradients(sees, torch.arange(5)), gradients(sees), strict=True)
    assert all(ours.equal(theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("sees", [NONE_BETWEEN, [[-1, -1]], [[0, 1, 2, 3]]])
def test_the_kernel_gives_what_attention_image_by_image_gives(sees, monkeypatch):
    sees = torch.tensor(sees)
    expected = gradients(sees)
    assert not expected[0][sees < 0].any()
    monkeypatch.setattr(cross_attention, "_has_kernel", lambda query: True)
    monkeypatch.setattr(cross_attention, "find_varlen_attention", lambda causal: kernel)
    found = gradients(sees)
    assert not found[0][sees < 0].any()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_neighbours_with_as_many_positions_attend_at_once(monkeypatch):
    """A row of a hundred images, as the planner simulates them, takes no hundred calls a layer."""
    calls = []
    attend = cross_attention.scaled_dot_product_attention

    def counted(*given: Tensor) -> Tensor:
        calls.append(len(given[0]))
        return attend(*given)

    monkeypatch.setattr(cross_attention, "scaled_dot_product_attention", counted)
    sees = torch.tensor([[-1, 0, 0, 1, 1, 2, 2, 3]])
    together = gradients(sees)
    assert calls == [3, 1]
    monkeypatch.setattr(cross_attention, "groupby", lambda images: ((one, [one]) for one in images))
    apart = gradients(sees)
    assert calls[2:] == [1, 1, 1, 1]
    assert all(ours.equal(theirs) for ours, theirs in zip(together, apart, strict=True))


def test_neighbours_with_as_many_views_attend_at_once(monkeypatch):
    shapes = []
    attend = cross_attention.scaled_dot_product_attention

    def counted(*given: Tensor) -> Tensor:
        shapes.append((len(given[1]), given[1].shape[2]))
        return attend(*given)

    monkeypatch.setattr(cross_attention, "scaled_dot_product_attention", counted)
    gradients(torch.tensor([[-1, 0, 0, 1, 1, 2, 2, 3, 3]]), torch.tensor([0, 2, 4, 9, 10]))
    assert shapes == [(2, 2 * 3), (1, 5 * 3), (1, 3)]


@pytest.mark.gpu
@pytest.mark.parametrize("width", [8, 64, 128])
@pytest.mark.parametrize("bounds", [None, *VIEW_BOUNDS])
def test_the_kernel_of_a_gpu_gives_what_attention_image_by_image_gives(width, bounds):
    torch.manual_seed(0)
    sees = torch.tensor(NONE_BETWEEN).repeat(1, 50).sort(dim=1)[0].cuda()  # rows of 300
    query = torch.randn(*sees.shape, 4, width, device="cuda", requires_grad=True)
    views = bounds[-1] if bounds else 4
    key, value = (torch.randn(views, 64, 4, width, device="cuda", requires_grad=True) for _ in "kv")
    bounds = torch.tensor(bounds).cuda() if bounds else None
    found = []
    for kind in (torch.bfloat16, torch.float32):
        given = (one.bfloat16().to(kind) for one in (query, key, value))  # the same numbers
        out = attend_to_images(*given, sees, bounds).float()
        found.append([out, *torch.autograd.grad(out.square().sum(), (query, key, value))])
    assert not found[0][0][sees < 0].any()
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).abs().max() <= 2e-2 * theirs.abs().max()


def test_layers_of_a_micro_batch_sort_its_positions_once(monkeypatch):
    sorts = []
    begin = ImageSegments.__init__
    monkeypatch.setattr(
        ImageSegments, "__init__", lambda *given: (sorts.append(1), begin(*given))[1]
    )
    vlm = open_gates(small_vlm(registry.load_connector("flamingo"), SMALL["flamingo"]))
    assert len(vlm.connector.inject_layers) == 3
    for number in (1, 2):
        vlm(make_batch(vlm, [[make_sample(number, images=2)]])).loss_sum.backward()
        assert len(sorts) == number


def test_segments_go_with_their_tensor():
    sees = torch.tensor(NONE_BETWEEN)
    assert find_segments(sees, 4) is find_segments(sees, 4)
    assert find_segments(sees, 5) is not find_segments(sees, 4)
    bounds = torch.tensor(VIEW_BOUNDS[2])
    assert find_segments(sees, 4, bounds) is find_segments(sees, 4, bounds)
    assert find_segments(sees, 4) is not find_segments(sees, 4, bounds)
    assert find_segments(sees, 4, bounds).view_counts == [7, 1, 3, 7]
    assert find_segments(sees, 4).segment_sizes == [4, 2, 0, 3, 3]
    before = len(cross_attention._SEGMENTS_CACHE)
    del sees
    gc.collect()
    assert len(cross_attention._SEGMENTS_CACHE) < before


@pytest.mark.parametrize("name", sorted(registry.connector_locations()))
@pytest.mark.parametrize("way", ["none", "full"])
def test_a_step_asks_the_device_nothing(name, way, monkeypatch):
    """On `meta` there is nothing to be read, so that whatever waits for a GPU fails."""
    monkeypatch.setattr(cross_attention, "_has_kernel", lambda query: True)
    monkeypatch.setattr(
        cross_attention,
        "find_varlen_attention",
        lambda causal: lambda q, k, v, *_: q + 0 * v[:1],
    )
    vlm = small_vlm(registry.load_connector(name), SMALL.get(name))
    rows = [[make_sample(1), make_sample(2, images=2)], [make_sample(3, images=0)]]
    batches = [make_batch(vlm, rows), make_batch(vlm, rows[1:])]
    vlm.to("meta").model.enable_activation_checkpointing(way)
    for batch in batches:
        out = vlm(batch.to("meta"))
        losses = [out.loss_sum, *(value for value, _ in out.extra.values())]
        torch.stack(losses).sum().backward()
        assert all(count.device.type == "cpu" for _, count in out.extra.values())
    assert all(p.grad is not None for p in vlm.connector.parameters())
