"""Attention over packed rows: samples that share a row never see each other.

Registered with transformers under the name `PACKED`. Sample lengths travel as a keyword argument of
the language model's forward, so there is no global state and no dense mask over the pack.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

PACKED = "vlbench_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    lengths: list[list[int]] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend causally inside each sample of each row.

    `query` is `[rows, heads, length, head width]`; `key` and `value` may have fewer heads.
    `lengths` gives the samples of each row in order, as Python numbers; what follows them is
    padding and gets zeros. Without `lengths` every row is one sample. Returns
    `[rows, length, heads, head width]`.
    """
    rows, _, length, _ = query.shape
    lengths = lengths or [[length]] * rows
    grouped = key.shape[1] != query.shape[1]
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
    return torch.cat(outs).transpose(1, 2), None


AttentionInterface.register(PACKED, packed_attention)
