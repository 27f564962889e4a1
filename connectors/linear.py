"""One Linear layer: the connector of LLaVA (Liu et al. 2023, arXiv:2304.08485).

Each patch feature becomes one visual token; there is no activation function.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from vlbench.connector.base import Connector, Shapes
from vlbench.model.weights.llava_projector import (
    OTHER_PARTS_PATTERN,
    check_projector_options,
    read_mm_projector,
)


class LinearConnector(Connector):
    """One Linear layer for every patch."""

    any_grid = True
    ignored_reference_keys = OTHER_PARTS_PATTERN

    def __init__(self, shapes: Shapes) -> None:
        """Build the layer from `shapes.vision_width` to `shapes.lm_width`."""
        super().__init__()
        self.tokens_per_image, self.token_grid = shapes.patches, shapes.grid
        self.layers = nn.Sequential(nn.Linear(shapes.vision_width, shapes.lm_width))

    def forward(self, features: Tensor) -> Tensor:
        """Project `[images, patches, vision_width]` to `[images, patches, lm_width]`."""
        return self.layers(features)

    def released_projector(self) -> nn.Sequential:
        """Return the layer, numbered as in LLaVA's `mm_projector`."""
        return self.layers

    def load_reference(self, weights: Mapping[str, Tensor]) -> set[str]:
        """Load LLaVA's linear projector: `model.mm_projector.weight` and `.bias`."""
        state = read_mm_projector(weights)
        check_projector_options(state, self.layers, "connector.name=llava_mlp ")
        return self.load_strict({f"layers.{key}": tensor for key, tensor in state.items()})
