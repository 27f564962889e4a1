"""Packed attention: samples never see each other, one by one or in one call of a GPU's kernel."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from random_vlm import make_batch, make_sample, small_vlm
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from vlbench.compat.torch_internals import find_varlen_attention, with_grouped_heads
from vlbench.connector import registry
from vlbench.model import packed_attention as packed_attention_module
from vlbench.model.packed_attention import (
    SampleBounds,
    packed_attention,
    sample_bounds,
)

LENGTHS = [[5, 3], [4, 2]]  # of rows of 8 positions: the second has 2 of padding


def heads(kind: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(2, n, 8, 16, dtype=kind) for n in (4, 2, 2))


def kernel(query, key, value, begins, other, longest, also, window_size, scale=None):
    """Attend as torch's variable-length kernel says it does, sample by sample."""
    assert window_size == (-1, 0) and longest == also and torch.equal(begins, other)
    outs = []
    for first, last in zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True):
        assert last - first <= longest
        q, k, v = (one[first:last].transpose(0, 1)[None] for one in (query, key, value))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def test_one_call_over_all_samples_gives_what_a_call_for_each_gives(monkeypatch):
    grouped = with_grouped_heads(kernel, supports_gqa=False)
    attend = functools.partial(grouped, window_size=(-1, 0))
    monkeypatch.setattr(packed_attention_module, "find_varlen_attention", lambda: attend)
    begins = torch.tensor([0, 5, 8, 12, 14, 16], dtype=torch.int32)
    query, key, value = heads(torch.bfloat16)
    one, _ = packed_attention(None, query, key, value, None, 0.25, bounds=SampleBounds(begins, 5))
    each, _ = packed_attention(None, query, key, value, None, 0.25, lengths=LENGTHS)
    torch.testing.assert_close(one[0], each[0])
    torch.testing.assert_close(one[1, :6], each[1, :6])  # what follows is padding


def test_under_autocast_the_model_attends_in_one_call(monkeypatch):
    """Its queries and keys are float32 there, because rotations are; its values are not."""
    begins = []

    def noted(query, key, value, first, *_, **options):
        begins.append(first)
        return query

    vlm = small_vlm(registry.load_connector("llava_mlp"))
    batch = make_batch(vlm, [[make_sample(1), make_sample(2)]])
    known = SampleBounds(
        torch.tensor([0, *batch.sample_lengths[0]], dtype=torch.int32).cumsum(0), 99
    )
    monkeypatch.setattr("vlbench.model.vlm.sample_bounds", lambda *_: known)
    monkeypatch.setattr(packed_attention_module, "find_varlen_attention", lambda: noted)
    vlm(batch)
    assert not begins  # the kernel takes no float32
    with torch.autocast("cpu", torch.bfloat16):
        vlm(batch)
    assert len(begins) == 3 and all(one is known.cu_seqlens for one in begins)


def test_without_a_kernel_rows_are_joined_position_by_position():
    """The output projection takes it as it is, and a row of contiguous pieces is cheap to join."""
    query = torch.randn(1, 9, 4, 8).transpose(1, 2)
    key = query[:, :2]
    out, _ = packed_attention(nn.Module(), query, key, key, None, lengths=[[4, 3]])
    assert out.shape == (1, 9, 4, 8)
    assert out.is_contiguous()
    assert not out[:, 7:].any()


def test_without_a_gpu_there_are_no_bounds():
    assert sample_bounds(LENGTHS, 8, torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("capability", "has_bounds"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)]
)
def test_gpus_without_flash_attention_take_a_call_for_each_sample(
    capability, has_bounds, monkeypatch
):
    """V100 and T4, on which the variable-length kernel raises an error."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, **__: self)
    bounds = sample_bounds(LENGTHS, 8, torch.device("cuda", 0))
    assert (bounds is not None) == has_bounds


@pytest.mark.parametrize(("width", "in_one_call"), [(100, False), (264, False), (64, True)])
def test_heads_that_the_kernel_refuses_are_attended_to_sample_by_sample(
    width, in_one_call, monkeypatch
):
    """OpenLLaMA of 3 billion weights has heads of width 100; the kernel takes multiples of 8."""
    calls = []

    def refuse(query, key, value, *given, **options):
        calls.append(query.shape[-1])
        return query

    monkeypatch.setattr(packed_attention_module, "find_varlen_attention", lambda: refuse)
    query = torch.randn(1, 2, 8, width, dtype=torch.bfloat16)
    bounds = SampleBounds(torch.tensor([0, 5, 8], dtype=torch.int32), 5)
    out, _ = packed_attention(None, query, query, query, None, bounds=bounds, lengths=[[5, 3]])
    assert bool(calls) == in_one_call
    if not in_one_call:
        each, _ = packed_attention(None, query, query, query, None, lengths=[[5, 3]])
        assert torch.equal(out, each)


def test_compiled_rows_are_one_operation_and_no_warning():
    query, key, value = heads(torch.bfloat16)
    bounds = SampleBounds(torch.tensor([0, 5, 8, 12, 14, 16], dtype=torch.int32), 5)
    find_varlen_attention()  # as the bounds do on a GPU

    def attend(query, key, value):
        return packed_attention(None, query, key, value, None, 0.25, bounds=bounds)[0]

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        graph = torch._dynamo.export(attend)(query, key, value).graph_module.graph
    assert sum("_varlen_attn" in str(node.target) for node in graph.nodes) == 1
    assert not [one for one in told if "lru_cache" in str(one.message)]


def test_this_torch_has_the_kernel_and_its_options_are_known():
    assert find_varlen_attention() is not None


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_the_kernel_of_a_gpu_gives_what_calls_one_by_one_give(kind):
    query, key, value = (one.to("cuda", kind).requires_grad_() for one in heads())
    known = sample_bounds(LENGTHS, 8, query.device)
    assert known is not None
    one, _ = packed_attention(None, query, key, value, None, 0.25, bounds=known)
    each, _ = packed_attention(None, query, key, value, None, 0.25, lengths=LENGTHS)
    for ours, other in ((one[0], each[0]), (one[1, :6], each[1, :6])):
        torch.testing.assert_close(ours, other, rtol=2e-2, atol=2e-2)
    (one[0].sum() + one[1, :6].sum()).backward()
    assert query.grad is not None and query.grad.isfinite().all()
