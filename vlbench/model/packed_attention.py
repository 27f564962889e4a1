"""Attention over packed rows: samples that share a row do not attend to each other.

Registered with transformers under the name PACKED_ATTENTION. Sample lengths are keyword arguments
of the language model's forward, so there is no global state and no dense mask over the row. On a
GPU in 16 bits all samples are one call of a variable-length kernel, elsewhere one call each.

Without lengths it attends as transformers' `sdpa` does, with padding masks and KV caches. So one
model trains on packed rows, and answers padded batches with a cache, in several threads at once,
without being switched between the two.
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
from vlbench.model.flash_kernels import runs_flash_kernels, takes_heads
from vlbench.model.language_loss import matmul_dtype

PACKED_ATTENTION = "vlbench_packed"
_sdpa_attention, _sdpa_mask = sdpa_attention()
SampleLengths = list[list[int]]


class OpaqueLengths:
    """Sample lengths hidden from torch.compile, which makes a graph for every length of a list."""

    def __init__(self, lengths: SampleLengths) -> None:
        """Take the sample lengths of each row."""
        self.lengths = lengths

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.lengths)


class SampleBounds(NamedTuple):
    """Where samples begin in the concatenated rows of a batch."""

    cu_seqlens: Tensor
    """`[samples + 1]` int32 on the device of the batch, the end of the last sample included."""
    max_seqlen: int
    """Length of the longest sample."""


def sample_bounds(
    lengths: SampleLengths, row_length: int, device: torch.device
) -> SampleBounds | None:
    """Return the bounds of samples in rows of `row_length` positions, None without a kernel.

    The padding of a row counts as a sample, whose output is not used. The bounds are made once per
    forward pass, for all layers, and are copied to the device without waiting.
    """
    if not runs_flash_kernels(device) or find_varlen_attention() is None:
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

    Args:
        module: The attention layer, as transformers passes it.
        query: `[rows, heads, length, head width]`.
        key: As `query`, maybe with fewer heads; it may begin earlier, in a KV cache.
        value: As `key`.
        attention_mask: `[rows, 1, length, keys]`; used without `lengths` and `bounds` alone.
        scaling: Factor of the scores; None for the usual one.
        dropout: Probability, in training.
        lengths: The sample lengths of each row in order, as Python numbers; what follows them is
            padding, whose output means nothing.
        bounds: The same for the variable-length kernel of a GPU; `lengths` count where it does not
            take the heads.

    Returns:
        `[rows, length, heads, head width]`, and None in place of the attention weights.
    """
    if lengths is None and bounds is None:
        return _attend_masked(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    dtype = matmul_dtype(query)  # rotary embedding gives float32, also under autocast
    if bounds is not None and takes_heads(dtype, query.shape[-1]):
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        return _attend_varlen(query, key, value, bounds, scaling), None
    return _attend_per_sample(query, key, value, scaling, dropout, lengths), None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # lengths differ in every batch
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
        # the CPU kernel gives each key head one thread, so that the others would be idle
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        grouped = False
    # positions before heads, as the projections and the kernel have them in memory: pieces of a row
    # are contiguous then, so that neither splitting nor joining nor their gradients copy by element
    by_position = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    row_outputs = []
    for row, sample_lengths in enumerate(lengths):
        padding_length = length - sum(sample_lengths)
        sizes = [*sample_lengths, padding_length] if padding_length else sample_lengths
        rows_of = by_position if rows == 1 else [tensor[row : row + 1] for tensor in by_position]
        pieces = [torch.split(tensor, sizes, dim=1)[: len(sample_lengths)] for tensor in rows_of]
        outputs = [
            scaled_dot_product_attention(
                query_piece.transpose(1, 2),
                key_piece.transpose(1, 2),
                value_piece.transpose(1, 2),
                is_causal=True,
                scale=scaling,
                dropout_p=dropout,
                enable_gqa=grouped,
            ).transpose(1, 2)
            for query_piece, key_piece, value_piece in zip(*pieces, strict=True)
        ]
        if padding_length:
            outputs.append(torch.zeros_like(by_position[0][:1, :padding_length]))
        row_outputs.append(torch.cat(outputs, dim=1))
    return row_outputs[0] if rows == 1 else torch.cat(row_outputs)


def _attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, bounds: SampleBounds, scaling: float | None
) -> Tensor:
    """Attend over the concatenated rows with a variable-length kernel."""
    rows, _, length, _ = query.shape
    attend = find_varlen_attention()
    assert attend is not None
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    cu_seqlens, max_seqlen = bounds
    options = {} if scaling is None else {"scale": scaling}
    out = attend(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
    return torch.unflatten(out, 0, (rows, length))


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
    """Attend where `attention_mask` `[rows, 1, length, keys]` allows; without one, causally."""
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

    Query heads that share a key head are treated as positions of one head, since all of them attend
    to the same keys: so keys are not repeated for every query head, as transformers may do.
    """
    grouped_query = torch.unflatten(query.squeeze(2), 1, (key.shape[1], -1))
    out = scaled_dot_product_attention(grouped_query, key, value, attention_mask, scale=scaling)
    return out.flatten(1, 2).unsqueeze(1)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _sdpa_mask)
