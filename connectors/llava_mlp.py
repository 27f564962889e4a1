"""LLaVA's MLP connector, with the LayerNorms of Yi-VL.

The same MLP projects every patch feature to a visual token: an image takes as many tokens as it has
patches. LLaVA-1.5 (Liu et al., 2023, arXiv:2310.03744) uses Linear, GELU, Linear; Yi-VL's
projector, `mlp2x_gelu_Norm`, has a LayerNorm after each Linear, also after the last one. In both
the hidden layers are as wide as the language model.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from vlbench.connector.base import Connector, Shapes
from vlbench.model.weights.llava_projector import (
    OTHER_PARTS_PATTERN,
    check_projector_options,
    read_mm_projector,
)


class LlavaMLP(Connector):
    """`depth` Linear layers, GELU between them, and if `norm` a LayerNorm after each Linear."""

    any_grid = True
    ignored_reference_keys = OTHER_PARTS_PATTERN
    # 32 values per factor of 2: this one option must reach any budget within 5 %
    size_options = {"mlp_ratio": [2.0**k * n / 32 for k in range(-5, 6) for n in range(32, 64)]}

    def __init__(
        self, shapes: Shapes, depth: int = 2, norm: bool = True, mlp_ratio: float = 1.0
    ) -> None:
        """Build the MLP from `shapes.vision_width` to `shapes.lm_width`; `depth` is at least 1.

        `mlp_ratio` is the width of the hidden layers, relative to the language model's.
        """
        super().__init__()
        if depth < 1:
            raise ValueError(f"connector llava_mlp: depth is {depth}; it must be at least 1")
        if mlp_ratio <= 0:
            raise ValueError(f"connector llava_mlp: mlp_ratio is {mlp_ratio}; it must be above 0")
        if depth == 1 and mlp_ratio != 1:
            raise ValueError(
                f"connector llava_mlp: mlp_ratio is {mlp_ratio}, and depth=1 has no hidden layer; "
                "leave it out"
            )
        hidden = max(1, round(shapes.lm_width * mlp_ratio))
        self._has_released_width = hidden == shapes.lm_width
        self.tokens_per_image, self.token_grid = shapes.patches, shapes.grid
        widths = [shapes.vision_width] + [hidden] * (depth - 1) + [shapes.lm_width]
        layers: list[nn.Module] = []
        for index in range(depth):
            layers += [nn.GELU()] if index else []
            layers += [nn.Linear(widths[index], widths[index + 1])]
            layers += [nn.LayerNorm(widths[index + 1])] if norm else []
        # Yi-VL's order: Linear, LayerNorm, GELU (exact), Linear, LayerNorm (keys 0, 1, 3, 4)
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """Project `[images, patches, vision_width]` to `[images, patches, lm_width]`."""
        return self.layers(features)

    def released_projector(self) -> nn.Sequential | None:
        """Return the layers, in the order of `mm_projector`, if they have its width."""
        return self.layers if self._has_released_width else None

    def load_reference(self, weights: Mapping[str, Tensor]) -> set[str]:
        """Load Yi-VL's or LLaVA's `mm_projector` weights, keys `0.weight`, `0.bias`, ..."""
        state = read_mm_projector(weights)
        check_projector_options(state, self.layers, "")
        return self.load_strict({f"layers.{key}": tensor for key, tensor in state.items()})
