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

from vlbench.compat.torch_internals import find_varlen_attention

MAX_HEAD_WIDTH = 256  # head width of torch's variable-length kernel, which wants a multiple of EVEN
HEAD_WIDTH_MULTIPLE = 8


class ImageSegments:
    """The positions of a micro-batch by the picture that they see."""

    def __init__(self, image_index: Tensor, image_count: int) -> None:
        """Sort `sees` `[rows, length]`, indices of pictures below `images`, -1 for none."""
        flat = image_index.flatten()
        self.sorted_order = flat.argsort(stable=True)
        """`[positions]`, in the order of their pictures, after those that see none."""
        places = torch.arange(len(flat), device=flat.device)
        self.inverse_order = torch.empty_like(self.sorted_order).scatter_(
            0, self.sorted_order, places
        )
        """`[positions]`: where in that order each position is."""
        groups = torch.arange(-1, image_count + 1, device=flat.device)
        self.cu_seqlens = torch.searchsorted(flat[self.sorted_order], groups, out_int32=True)
        """`[images + 2]` int32: where in that order each group begins, and where the last ends."""

    @functools.cached_property
    def segment_sizes(self) -> list[int]:
        """How many positions see none, and how many each picture; a GPU has to be waited for."""
        return self.cu_seqlens.diff().tolist()  # type: ignore[no-any-return]


_SEGMENTS_CACHE: MutableMapping[Tensor, tuple[int, ImageSegments]] = WeakIdKeyDictionary()


def find_segments(image_index: Tensor, image_count: int) -> ImageSegments:
    """Return the segments of `sees`, found once for all that ask with the same tensor.

    They live as long as the tensor, which nobody may write into.
    """
    known = _SEGMENTS_CACHE.get(image_index)
    if known is None or known[0] != image_count:
        known = _SEGMENTS_CACHE[image_index] = image_count, ImageSegments(image_index, image_count)
    return known[1]


def attend_to_images(query: Tensor, key: Tensor, value: Tensor, image_index: Tensor) -> Tensor:
    """Let every position attend to the picture that it sees.

    `query` is `[rows, length, heads, head width]`, `key` and `value` are `[images, tokens, heads,
    head width]`, `sees` is `[rows, length]`. Returns the shape of `query`, exactly zero where
    `sees` is -1.
    """
    seen = find_segments(image_index, len(key))
    sorted_query = query.flatten(0, 1)[seen.sorted_order]
    attend = _attend_images_varlen if _has_kernel(query) else _attend_per_image
    return attend(sorted_query, key, value, seen)[seen.inverse_order].view(query.shape)


def _has_kernel(query: Tensor) -> bool:
    width = query.shape[-1]
    fits = (
        query.dtype in (torch.bfloat16, torch.float16)
        and not width % HEAD_WIDTH_MULTIPLE
        and width <= MAX_HEAD_WIDTH
    )
    return fits and query.device.type == "cuda" and find_varlen_attention(causal=False) is not None


def _attend_images_varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: ImageSegments
) -> Tensor:
    """Attend with a variable-length kernel; who sees no picture sees one of zeros."""
    attend = find_varlen_attention(causal=False)
    assert attend is not None
    images, tokens = key.shape[:2]
    k, v = (pad(one, (0, 0, 0, 0, 0, 0, 1, 0)).flatten(0, 1) for one in (key, value))
    begins = torch.arange(
        0, (images + 2) * tokens, tokens, dtype=torch.int32, device=segments.cu_seqlens.device
    )
    # the longest segment is not known without asking the device: no more than all positions
    return attend(query, k, v, segments.cu_seqlens, begins, len(query), tokens)


def _attend_per_image(query: Tensor, key: Tensor, value: Tensor, segments: ImageSegments) -> Tensor:
    """Attend picture by picture."""
    unseeing, *groups = query.split(segments.segment_sizes)
    outs = [torch.zeros_like(unseeing)]
    for group, k, v in zip(groups, key.transpose(1, 2), value.transpose(1, 2), strict=True):
        out = scaled_dot_product_attention(group.transpose(0, 1)[None], k[None], v[None])
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)
