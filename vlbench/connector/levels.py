"""Values of one level, a tensor, or of several, a tuple.

Features have a level for each encoder block that a connector reads (`Connector.vision_layers`).
Visual values may have levels as well: DeepStack adds one before each of the first decoder layers.
Where one tensor is needed, on disk or between processes, the levels of an image are stacked.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Levels = Tensor | tuple[Tensor, ...]
"""One tensor, or one for each level; dimension 0 counts images."""


def as_levels(values: Levels) -> tuple[Tensor, ...]:
    """Return the levels; a tensor is the only one."""
    return values if isinstance(values, tuple) else (values,)


def first_level(visual: Levels) -> Tensor:
    """Return what is written to the image positions: the first level, `[images, tokens, width]`."""
    return visual[0] if isinstance(visual, tuple) else visual


def map_levels(function: Callable[[Tensor], Tensor], values: Levels) -> Levels:
    """Return `function` of each level."""
    return tuple(map(function, values)) if isinstance(values, tuple) else function(values)


def concat_images(before: Levels, more: Levels) -> Levels:
    """Return the values of some images and of more images, level by level."""
    if isinstance(before, tuple):
        pairs = zip(before, as_levels(more), strict=True)
        return tuple(torch.cat(pair) for pair in pairs)
    return torch.cat([before, *as_levels(more)])


def concat_channels(values: Levels) -> Tensor:
    """Return `[images, rows, widths of all levels]`; the first level if they differ in rows."""
    levels = as_levels(values)
    same_rows = len({level.shape[1] for level in levels}) == 1
    return torch.cat(levels, dim=-1) if same_rows and len(levels) > 1 else levels[0]


def stack_levels(features: Levels) -> Tensor:
    """Return features as one tensor: `[images, levels, patches, width]` of a tuple."""
    return torch.stack(features, dim=1) if isinstance(features, tuple) else features


def unstack_levels(features: Tensor) -> Levels:
    """Return what `stack_levels` was given; each level is a tensor of its own, as it was there."""
    if features.dim() < 4:
        return features
    return tuple(level.contiguous() for level in features.unbind(1))
