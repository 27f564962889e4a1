"""Cross-attention in which every position attends to one image: block-diagonal, linear in length.

Positions are sorted by image, and the positions of an image attend to the visual tokens of its
views only, however many these are. The order is computed once per micro-batch, for all layers. On a
GPU in 16 bits nothing of it is read back to the host, which would have to wait for the device.
"""

from __future__ import annotations

import functools
from collections.abc import MutableMapping
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.weak import WeakIdKeyDictionary

from vlbench.compat.torch_internals import find_varlen_attention
from vlbench.model.flash_kernels import runs_flash_kernels, takes_heads


class ImageSegments:
    """The positions of a micro-batch, sorted by the image that they attend to."""

    def __init__(
        self, image_index: Tensor, image_count: int, view_bounds: Tensor | None = None
    ) -> None:
        """Sort `image_index` `[rows, length]`: below `image_count`, -1 for no image.

        `view_bounds` `[images + 1]` has the first view of each image; None: an image is one view.
        """
        flat = image_index.flatten()
        self.sorted_order = flat.argsort(stable=True)
        """`[positions]`, by image; those without an image come first."""
        positions = torch.arange(len(flat), device=flat.device)
        self.inverse_order = torch.empty_like(self.sorted_order).scatter_(
            0, self.sorted_order, positions
        )
        """`[positions]`: the place of each position in that order."""
        groups = torch.arange(-1, image_count + 1, device=flat.device)
        self.cu_seqlens = torch.searchsorted(flat[self.sorted_order], groups, out_int32=True)
        """`[images + 2]` int32: where each group begins in that order, and where the last ends."""
        self.image_count, self.view_bounds = image_count, view_bounds

    @functools.cached_property
    def segment_sizes(self) -> list[int]:
        """Positions without an image, then those of each image; waits for the device."""
        sizes: list[int] = self.cu_seqlens.diff().tolist()
        return sizes

    @functools.cached_property
    def view_counts(self) -> list[int]:
        """Views of each image; waits for the device."""
        if self.view_bounds is None:
            return [1] * self.image_count
        counts: list[int] = self.view_bounds.diff().tolist()
        return counts


_SEGMENTS_CACHE: MutableMapping[Tensor, ImageSegments] = WeakIdKeyDictionary()


def find_segments(
    image_index: Tensor, image_count: int, view_bounds: Tensor | None = None
) -> ImageSegments:
    """Return the segments of `image_index`, computed once for all calls with the same tensors.

    They are kept as long as `image_index`, and neither tensor must be written to.
    """
    cached = _SEGMENTS_CACHE.get(image_index)
    if cached is None or cached.image_count != image_count or cached.view_bounds is not view_bounds:
        cached = ImageSegments(image_index, image_count, view_bounds)
        _SEGMENTS_CACHE[image_index] = cached
    return cached


def attend_to_images(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    image_index: Tensor,
    view_bounds: Tensor | None = None,
) -> Tensor:
    """Let every position attend to the visual tokens of all views of its image.

    Args:
        query: `[rows, length, heads, head width]`.
        key: `[views, tokens, heads, head width]`, maybe with fewer heads, each for as many heads of
            the query.
        value: As `key`.
        image_index: `[rows, length]`, the image of each position; -1 for none.
        view_bounds: `[images + 1]`, the first view of each image, and the number of all views;
            None: an image is one view.

    Returns:
        The shape of `query`, exactly zero where `image_index` is -1.
    """
    group = query.shape[2] // key.shape[2]
    if group > 1:
        key, value = (tensor.repeat_interleave(group, dim=2) for tensor in (key, value))
    image_count = len(key) if view_bounds is None else len(view_bounds) - 1
    segments = find_segments(image_index, image_count, view_bounds)
    sorted_query = query.flatten(0, 1)[segments.sorted_order]
    attend = _attend_images_varlen if _has_kernel(query) else _attend_per_image
    return attend(sorted_query, key, value, segments)[segments.inverse_order].view(query.shape)


def _has_kernel(query: Tensor) -> bool:
    return (
        takes_heads(query.dtype, query.shape[-1])
        and runs_flash_kernels(query.device)
        and find_varlen_attention(causal=False) is not None
    )


def _attend_images_varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: ImageSegments
) -> Tensor:
    """Attend with a variable-length kernel; positions without an image get one of zeros."""
    attend = find_varlen_attention(causal=False)
    assert attend is not None
    views, tokens = key.shape[:2]
    k, v = (pad(tensor, (0, 0, 0, 0, 0, 0, 1, 0)).flatten(0, 1) for tensor in (key, value))
    device, bounds = segments.cu_seqlens.device, segments.view_bounds
    if bounds is None:
        most_tokens = tokens
        cu_seqlens_k = torch.arange(
            0, (views + 2) * tokens, tokens, dtype=torch.int32, device=device
        )
    else:
        # the largest image is on the device; all views are an upper bound
        most_tokens = views * tokens
        cu_seqlens_k = pad((bounds + 1) * tokens, (1, 0)).to(torch.int32)
    # likewise the longest segment, and all positions
    return attend(query, k, v, segments.cu_seqlens, cu_seqlens_k, len(query), most_tokens)


def _attend_per_image(query: Tensor, key: Tensor, value: Tensor, segments: ImageSegments) -> Tensor:
    """Attend image by image; neighbours with as many positions and views at once."""
    without_image, *sizes = segments.segment_sizes
    images = zip(sizes, segments.view_counts, strict=True)
    equal = [(*alike, len(list(group))) for alike, group in groupby(images)]
    first, *queries = query.split([without_image, *(size * count for size, _, count in equal)])
    keys, values = (one.split([views * count for _, views, count in equal]) for one in (key, value))
    outs = [torch.zeros_like(first)]
    for (size, views, count), group, k, v in zip(equal, queries, keys, values, strict=True):
        by_image = group.unflatten(0, (count, size))
        if views > 1:
            k, v = (one.unflatten(0, (count, views)).flatten(1, 2) for one in (k, v))
        out = scaled_dot_product_attention(*(one.transpose(1, 2) for one in (by_image, k, v)))
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)
