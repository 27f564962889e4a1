"""DeepStack: one token per patch, and features of earlier encoder blocks added in the decoder.

Meng et al. 2024 (arXiv:2406.04334), in the form of Qwen3-VL (Bai et al. 2025, arXiv:2511.21631).
The MLP of `llava_mlp` carries the features of `vision.layer` to the image positions. Each of
`levels` earlier blocks has a network of its own (LayerNorm, Linear, GELU, Linear, as Qwen3-VL's
mergers), and what it gives is added to the same image positions before one of the decoder layers
`first`, `first` + 1, ... Text is left as it is, and an image takes no more positions than before.
"""

from typing import Any

from torch import Tensor, nn

from vlbench.connector import registry
from vlbench.connector.base import Connector, ImagePlaces, Shapes

NORM_EPSILON = 1e-6  # of Qwen3-VL's mergers


class DeepStackConnector(Connector):
    """The MLP `llava_mlp`, and `levels` more networks whose tokens are added in the decoder."""

    any_grid = True
    size_options = {
        "levels": range(1, 17),
        "mlp_ratio": [2.0**k * n / 32 for k in range(-5, 6) for n in range(32, 64)],
    }

    def __init__(
        self,
        shapes: Shapes,
        levels: int = 3,
        blocks: tuple[int, ...] = (),
        first: int = 1,
        depth: int = 2,
        norm: bool = True,
        mlp_ratio: float = 1.0,
    ) -> None:
        """Build the MLP and the networks of the levels.

        Args:
            shapes: Sizes of vision encoder and language model.
            levels: Encoder blocks that are added, at equal distances before `vision.layer`.
            blocks: Their numbers instead, from 0 or from -1, the last; one for each level.
            first: Decoder layer before which the first level is added; Qwen3-VL adds it behind
                layer 0, which is before layer 1.
            depth: Linear layers of the MLP.
            norm: Whether a LayerNorm follows each of them.
            mlp_ratio: Width of all hidden layers, relative to the language model's.
        """
        super().__init__()
        _check_options(shapes, levels, blocks, first)
        mlp = registry.load_connector("llava_mlp")(shapes, depth, norm, mlp_ratio)
        self.layers: Any = mlp.layers
        self.tokens_per_image, self.token_grid = shapes.patches, shapes.grid
        self.inject_layers = tuple(range(first, first + levels))
        used = shapes.vision_layer + 1
        spread = tuple(used * number // (levels + 1) - 1 for number in range(1, levels + 1))
        self.vision_layers = (shapes.vision_layer, *(blocks or spread))
        width, hidden = shapes.vision_width, max(1, round(shapes.lm_width * mlp_ratio))
        self.mergers: Any = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width, NORM_EPSILON),
                nn.Linear(width, hidden),
                nn.GELU(),
                nn.Linear(hidden, shapes.lm_width),
            )
            for _ in range(levels)
        )

    def forward(self, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the visual tokens and those of each level, all `[images, patches, lm_width]`."""
        last, *earlier = features
        merged = (merge(level) for merge, level in zip(self.mergers, earlier, strict=True))
        return (self.layers(last), *merged)

    def inject(
        self, layer: int, hidden: Tensor, visual: tuple[Tensor, ...], where: ImagePlaces
    ) -> Tensor:
        """Add a level to the image positions, each its own token."""
        level = visual[1 + layer - self.inject_layers[0]]
        return hidden + where.own_tokens(level).to(hidden.dtype)

    def count_latents(self, visual: tuple[Tensor, ...]) -> int:
        """Return 0: what is added stands at image positions, which are counted already."""
        return 0


def _check_options(shapes: Shapes, levels: int, blocks: tuple[int, ...], first: int) -> None:
    """Raise a ValueError for levels that encoder or language model do not have."""
    most = min(shapes.vision_layer, shapes.lm_layers - 1)
    if not blocks and not 1 <= levels <= most:
        raise ValueError(
            f"connector deepstack: levels is {levels}; before vision.layer are "
            f"{shapes.vision_layer} encoder blocks, and behind the first {shapes.lm_layers - 1} "
            f"decoder layers, so 1 to {most} are allowed"
        )
    if blocks and len(blocks) != levels:
        raise ValueError(
            f"connector deepstack: blocks names {len(blocks)}, and levels is {levels}: say "
            f"levels={len(blocks)}"
        )
    if not 0 <= first <= shapes.lm_layers - levels:
        raise ValueError(
            f"connector deepstack: first is {first}; with {levels} levels and {shapes.lm_layers} "
            f"decoder layers 0 to {shapes.lm_layers - levels} are allowed"
        )
