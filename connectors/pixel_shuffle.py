"""Space to depth, then an MLP: InternVL (Chen et al. 2024, arXiv:2404.16821), Idefics3.

Each square of neighbouring patches is concatenated into one wide vector, which reduces the visual
tokens without losing information. LayerNorm, Linear, GELU, Linear project it to the language
model's width.
"""

from torch import Tensor, nn

from vlbench.connector.base import Connector, Shapes
from vlbench.connector.patch_windows import check_window, split_windows, window_grid


class PixelShuffleConnector(Connector):
    """`shuffle` x `shuffle` patches become one token."""

    size_options = {"shuffle": (1, 2, 4, 8)}

    def __init__(self, shapes: Shapes, shuffle: int = 2) -> None:
        """Build the MLP; `shuffle` must divide rows and columns of the grid of patches."""
        super().__init__()
        check_window("pixel_shuffle", "shuffle", shuffle, shapes.grid)
        self.grid = shapes.grid
        self.shuffle_factor = shuffle
        self.tokens_per_image = shapes.patches // shuffle**2
        self.token_grid = window_grid(shapes.grid, shuffle)
        width = shapes.vision_width * shuffle**2
        self.layers = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, shapes.lm_width),
            nn.GELU(),
            nn.Linear(shapes.lm_width, shapes.lm_width),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Turn `[images, patches, vision_width]` into `[images, patches / shuffle^2, lm_width]`."""
        windows = split_windows(features, self.grid, self.shuffle_factor).flatten(1)
        return self.layers(windows.unflatten(0, (-1, self.tokens_per_image)))
