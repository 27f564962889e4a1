"""Dense Connector: one token per patch, made of several encoder blocks side by side.

Yao et al. 2024 (arXiv:2405.13800). The encoder's blocks are cut into `groups` of equal size; what
stands for a group is the mean of its blocks (`average`, the paper's dense channel integration) or
its last block (sparse channel integration). The features of `vision.layer` and those of the groups
are written one behind the other, and LLaVA's MLP (Linear, GELU, Linear) carries them into the text:
an image takes no more positions, and nothing but the first Linear layer becomes larger.
"""

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from vlbench.connector.base import Connector, Shapes


class DenseConnector(Connector):
    """Channel concatenation of `vision.layer` and `groups` of encoder blocks, and an MLP."""

    any_grid = True
    size_options = {"mlp_ratio": [2.0**k * n / 32 for k in range(-5, 6) for n in range(32, 64)]}

    def __init__(
        self,
        shapes: Shapes,
        groups: int = 2,
        average: bool = True,
        mlp_ratio: float = 1.0,
    ) -> None:
        """Build the MLP from `vision_width` x (1 + `groups`) to `lm_width`.

        Args:
            shapes: Sizes of vision encoder and language model.
            groups: Groups of blocks, from the first block to that of `vision.layer`.
            average: Whether the mean of a group's blocks stands for it; otherwise its last block.
            mlp_ratio: Width of the hidden layer, relative to the language model's.
        """
        super().__init__()
        used = shapes.vision_layer + 1
        if not 1 <= groups <= used:
            raise ValueError(
                f"connector dense: groups is {groups}; up to vision.layer the encoder has {used} "
                f"blocks, so 1 to {used} are allowed"
            )
        if mlp_ratio <= 0:
            raise ValueError(f"connector dense: mlp_ratio is {mlp_ratio}; it must be above 0")
        self.tokens_per_image, self.token_grid = shapes.patches, shapes.grid
        bounds = [used * number // groups for number in range(groups + 1)]
        spans = [range(*pair) for pair in itertools.pairwise(bounds)]
        self._groups = spans if average else [span[-1:] for span in spans]
        self.vision_layers = (shapes.vision_layer, *itertools.chain(*self._groups))
        hidden = max(1, round(shapes.lm_width * mlp_ratio))
        self.layers: Any = nn.Sequential(
            nn.Linear(shapes.vision_width * (1 + groups), hidden),
            nn.GELU(),
            nn.Linear(hidden, shapes.lm_width),
        )

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        """Turn a tuple of `[images, patches, width]` into `[images, patches, lm_width]`."""
        last, *grouped = features
        rest = iter(grouped)
        means = [_mean(list(itertools.islice(rest, len(group)))) for group in self._groups]
        return self.layers(torch.cat([last, *means], dim=-1))


def _mean(levels: list[Tensor]) -> Tensor:
    return levels[0] if len(levels) == 1 else sum(levels[1:], start=levels[0]) / len(levels)
