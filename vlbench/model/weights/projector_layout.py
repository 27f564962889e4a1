"""The projector of a connector, as the released layouts know it: Linear, LayerNorm, GELU."""

from __future__ import annotations

from torch import nn

from vlbench.errors import UserError
from vlbench.model.vlm import VLM


def require_projector(vlm: VLM, layout_name: str) -> nn.Sequential:
    """Return the layers of the connector; a Mistake when it is no projector."""
    found = vlm.connector.released_projector()
    if found is None:
        raise UserError(
            f"connector {type(vlm.connector).__name__} does not fit into {layout_name}, which "
            "holds a "
            "projector of Linear layers as wide as the language model; format=vlbench keeps every "
            "connector"
        )
    return found


def projector_depth_and_norm(projector: nn.Sequential) -> tuple[int, bool]:
    """Return the number of Linear layers, and whether a LayerNorm follows each of them."""
    depth = sum(isinstance(layer, nn.Linear) for layer in projector)
    return depth, any(isinstance(layer, nn.LayerNorm) for layer in projector)
