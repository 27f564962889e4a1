"""Attention over packed rows: samples that share a row never see each other.

Registered with transformers under the name `PACKED`. Sample lengths travel as keyword arguments of
the language model's forward, so there is no global state and no dense mask over the pack. On a GPU
in 16 bits all samples are one call of a variable-length kernel, elsewhere each has its own call.

Without lengths it attends as transformers' `sdpa` does: to padding masks and key-value caches. So
one model trains on packed rows, answers padded batches and reads with a cache, in several threads
at once, and nothing about it is ever switched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from vlbench.compat.torch_internals import find_varlen_attention
from vlbench.compat.transformers_internals import sdpa_attention
from vlbench.model.language_loss import matmul_dtype

PACKED_ATTENTION = "vlbench_packed"
_sdpa_attention, _sdpa_mask = sdpa_attention()
SampleLengths = list[list[int]]


class OpaqueLengths:
    """Lengths for compiled layers: a graph is made for every size of a list that can be seen."""

    def __init__(self, lengths: SampleLengths) -> None:
        """Give `lengths`, row by row."""
        self.lengths = lengths

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.lengths)


class SampleBounds(NamedTuple):
    """Where samples begin in the rows of a batch, laid end to end."""

    cu_seqlens: Tensor
    """`[samples + 1]` int32 on the device of the batch, the end of the last sample included."""
    max_seqlen: int
    """Length of the longest sample."""


def sample_bounds(
    lengths: SampleLengths, row_length: int, device: torch.device
) -> SampleBounds | None:
    """Return the bounds of samples in rows of `length` positions, None where no kernel takes them.

    What follows the samples of a row counts as a sample: nobody reads what it becomes. The bounds
    are made once per forward pass, for all layers, and travel to the device without waiting.
    """
    if device.type != "cuda" or find_varlen_attention() is None:
        return None
    sizes = [size for row in lengths for size in (*row, row_length - sum(row)) if size]
    begins = torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return SampleBounds(begins.pin_memory().to(device, non_blocking=True), max(sizes))


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    lengths: Iterable[list[int]] | None = None,
    bounds: SampleBounds | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend causally inside each sample of each row.

    `query` is `[rows, heads, length, head width]`; `key` and `value` may have fewer heads.
    `lengths` gives the samples of each row in order, as Python numbers; what follows them is
    padding, whose values mean nothing. `bounds` says the same to the kernel of a GPU. With neither,
    every row is one sample, seen as `attention_mask` says; keys may begin earlier (a cache).
    Returns `[rows, length, heads, head width]`.
    """
    if lengths is None and bounds is None:
        return _attend_masked(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    kind = matmul_dtype(query)  # rotation makes queries and keys float32, also under autocast
    if bounds is not None and kind in (torch.bfloat16, torch.float16):
        query, key, value = (one.to(kind) for one in (query, key, value))
        return _attend_varlen(query, key, value, bounds, scaling), None
    return _attend_per_sample(query, key, value, scaling, dropout, lengths), None


@torch.compiler.disable  # lengths are others in every batch: a graph would be made for each
def _attend_per_sample(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    lengths: Iterable[list[int]] | None,
) -> Tensor:
    """Attend sample by sample."""
    rows, _, length, _ = query.shape
    lengths = [[length]] * rows if lengths is None else lengths
    grouped = key.shape[1] != query.shape[1]
    if grouped and query.device.type == "cpu" and key.shape[1] < torch.get_num_threads():
        # the kernel of a CPU gives a thread to each head of the keys, and others nothing to do
        groups = query.shape[1] // key.shape[1]
        key, value = (one.repeat_interleave(groups, dim=1) for one in (key, value))
        grouped = False
    outs = []
    for row, parts in enumerate(lengths):
        sizes = [*parts, length - sum(parts)]
        split = [t[row : row + 1].split(sizes, dim=2) for t in (query, key, value)]
        done = [
            scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=grouped
            )
            for q, k, v in zip(*(pieces[:-1] for pieces in split), strict=True)
        ]
        outs.append(torch.cat([*done, torch.zeros_like(split[0][-1])], dim=2))
    return torch.cat(outs).transpose(1, 2)


def _attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, bounds: SampleBounds, scaling: float | None
) -> Tensor:
    """Attend over all rows laid end to end, as variable-length kernels read them."""
    rows, _, length, _ = query.shape
    attend = find_varlen_attention()
    assert attend is not None
    q, k, v = (one.transpose(1, 2).flatten(0, 1) for one in (query, key, value))
    begins, longest = bounds
    options = {} if scaling is None else {"scale": scaling}
    out = attend(q, k, v, begins, begins, longest, longest, **options)
    return out.unflatten(0, (rows, length))


def _attend_masked(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as `mask` `[rows, 1, length, keys]` says; without one, causally."""
    if (
        attention_mask is not None
        and query.shape[2] == attention_mask.shape[1] == 1
        and not dropout
    ):
        return _attend_single_query(query, key, value, attention_mask, scaling), None
    out, _ = _sdpa_attention(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )
    return out, None


def _attend_single_query(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float | None
) -> Tensor:
    """Attend from one position of each row, `query` `[rows, heads, 1, head width]`.

    Query heads that share a key head attend as positions of one head would, since all of them see
    the same: so keys are read as they are, where transformers may repeat them for every query head.
    """
    shared = query.squeeze(2).unflatten(1, (key.shape[1], -1))
    out = scaled_dot_product_attention(shared, key, value, attention_mask, scale=scaling)
    return out.flatten(1, 2).unsqueeze(1)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _sdpa_mask)
