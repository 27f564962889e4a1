"""One Linear layer: the connector of LLaVA (Liu et al. 2023, arXiv:2304.08485).

Each patch feature becomes one token of the language model, without any activation.
"""

from torch import Tensor, nn

from vlbench.connector import Connector, Shapes


class LinearConnector(Connector):
    """Carry every patch by the same Linear layer."""

    def __init__(self, shapes: Shapes) -> None:
        """Build the layer from `shapes.vision_width` to `shapes.lm_width`."""
        super().__init__()
        self.tokens_per_image = shapes.patches
        self.layers = nn.Sequential(nn.Linear(shapes.vision_width, shapes.lm_width))

    def forward(self, features: Tensor) -> Tensor:
        """Carry `[images, patches, vision_width]` to `[images, patches, lm_width]`."""
        return self.layers(features)

    def projector(self) -> nn.Sequential:
        """Return the layer, numbered as in LLaVA's `mm_projector`."""
        return self.layers
