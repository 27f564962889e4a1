"""Cross-attention in which every position looks at one picture, so that work grows with the text.

Positions are brought in the order of their pictures, and each picture's own positions attend to its
visual tokens alone. What is where is found once per micro-batch, for all layers that look, and on a
GPU in 16 bits nothing of it is read back: a host that asks the device waits for all it has to do.
"""

from __future__ import annotations

import functools
from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.weak import WeakIdKeyDictionary

from vlbench.model.attention import varlen

WIDEST = 256  # head width of torch's variable-length kernel, which wants a multiple of EVEN
EVEN = 8


class Segments:
    """The positions of a micro-batch by the picture that they see."""

    def __init__(self, sees: Tensor, images: int) -> None:
        """Sort `sees` `[rows, length]`, indices of pictures below `images`, -1 for none."""
        flat = sees.flatten()
        self.order = flat.argsort(stable=True)
        """`[positions]`, in the order of their pictures, after those that see none."""
        places = torch.arange(len(flat), device=flat.device)
        self.back = torch.empty_like(self.order).scatter_(0, self.order, places)
        """`[positions]`: where in that order each position is."""
        groups = torch.arange(-1, images + 1, device=flat.device)
        self.begins = torch.searchsorted(flat[self.order], groups, out_int32=True)
        """`[images + 2]` int32: where in that order each group begins, and where the last ends."""

    @functools.cached_property
    def sizes(self) -> list[int]:
        """How many positions see none, and how many each picture; a GPU has to be waited for."""
        return self.begins.diff().tolist()  # type: ignore[no-any-return]


_KNOWN: MutableMapping[Tensor, tuple[int, Segments]] = WeakIdKeyDictionary()


def segments(sees: Tensor, images: int) -> Segments:
    """Return the segments of `sees`, found once for all that ask with the same tensor.

    They live as long as the tensor, which nobody may write into.
    """
    known = _KNOWN.get(sees)
    if known is None or known[0] != images:
        known = _KNOWN[sees] = images, Segments(sees, images)
    return known[1]


def look(query: Tensor, key: Tensor, value: Tensor, sees: Tensor) -> Tensor:
    """Let every position attend to the picture that it sees.

    `query` is `[rows, length, heads, head width]`, `key` and `value` are `[images, tokens, heads,
    head width]`, `sees` is `[rows, length]`. Returns the shape of `query`, exactly zero where
    `sees` is -1.
    """
    seen = segments(sees, len(key))
    sorted_query = query.flatten(0, 1)[seen.order]
    attend = _in_one_call if _has_kernel(query) else _one_by_one
    return attend(sorted_query, key, value, seen)[seen.back].view(query.shape)


def _has_kernel(query: Tensor) -> bool:
    width = query.shape[-1]
    fits = query.dtype in (torch.bfloat16, torch.float16) and not width % EVEN and width <= WIDEST
    return fits and query.device.type == "cuda" and varlen(causal=False) is not None


def _in_one_call(query: Tensor, key: Tensor, value: Tensor, seen: Segments) -> Tensor:
    """Attend with a variable-length kernel; who sees no picture sees one of zeros."""
    attend = varlen(causal=False)
    assert attend is not None
    images, tokens = key.shape[:2]
    k, v = (pad(one, (0, 0, 0, 0, 0, 0, 1, 0)).flatten(0, 1) for one in (key, value))
    begins = torch.arange(
        0, (images + 2) * tokens, tokens, dtype=torch.int32, device=seen.begins.device
    )
    # the longest segment is not known without asking the device: no more than all positions
    return attend(query, k, v, seen.begins, begins, len(query), tokens)


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, seen: Segments) -> Tensor:
    """Attend picture by picture."""
    unseeing, *groups = query.split(seen.sizes)
    outs = [torch.zeros_like(unseeing)]
    for group, k, v in zip(groups, key.transpose(1, 2), value.transpose(1, 2), strict=True):
        out = scaled_dot_product_attention(group.transpose(0, 1)[None], k[None], v[None])
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)
