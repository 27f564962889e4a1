"""The last decoder layer's MLP, computed at the supervised positions alone.

No layer reads what the last one makes of the other positions, and neither does the loss. The MLP
has two thirds of a layer's products (Yi-6B), and positions of images and questions are never
supervised, so a step of training spares a good part of a layer. Losses and gradients are the same
up to the order of sums. Compiled layers do without: they share one graph, and the last one would
need its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

LAST_LAYER = "is_last_layer"
"""Attribute of a decoder layer: whether it may leave positions out."""
POSITIONS = "supervised_positions"
"""Keyword argument of decoder layers: `[tokens]` indices into the flattened rows, the positions
that the loss reads; None or absent: all are read."""


def layer_forward(layer: nn.Module, kwargs: dict[str, Any]) -> Callable[..., Any]:
    """Return the forward of a layer's class, bound for a call with `kwargs`, without POSITIONS.

    The class's own forward runs, whatever the family, on a shallow copy with another `mlp`:
    several threads may call the layer itself at once.
    """
    positions = kwargs.pop(POSITIONS, None)
    if positions is not None and vars(layer).get(LAST_LAYER):
        copied = object.__new__(type(layer))
        vars(copied).update(
            vars(layer), mlp=functools.partial(_mlp_at, layer.get_submodule("mlp"), positions)
        )
        layer = copied
    # no bound method: torch.compile would look it up by its name, and find what is compiled
    return functools.partial(type(layer).forward, layer)


def _mlp_at(mlp: nn.Module, positions: Tensor, hidden: Tensor) -> Tensor:
    """Return the MLP's output `[rows, length, lm_width]`, zero where it is not computed."""
    flat = hidden.flatten(0, 1)
    output: Tensor = mlp(flat.index_select(0, positions)[None])[0]
    zeros = output.new_zeros(flat.shape)
    return zeros.index_copy(0, positions, output).view_as(hidden)
