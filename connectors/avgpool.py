"""Average pooling, then an MLP: DeCo (Yao et al. 2024, arXiv:2405.20985).

Square blocks of patches are averaged, which reduces the visual tokens without any parameters; an
MLP as in LLaVA-1.5 projects each mean to the language model's width.
"""

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from vlbench.connector.base import Connector, Shapes
from vlbench.connector.patch_windows import check_window, window_grid


class AvgPoolConnector(Connector):
    """Means of `pool` x `pool` patches, then Linear, GELU, Linear."""

    size_options = {"pool": (1, 2, 4, 8)}

    def __init__(self, shapes: Shapes, pool: int = 2) -> None:
        """Build the MLP; `pool` must divide rows and columns of the grid of patches."""
        super().__init__()
        check_window("avgpool", "pool", pool, shapes.grid)
        self.grid = shapes.grid
        self.pool = pool
        self.tokens_per_image = shapes.patches // pool**2
        self.token_grid = window_grid(shapes.grid, pool)
        self.layers = nn.Sequential(
            nn.Linear(shapes.vision_width, shapes.lm_width),
            nn.GELU(),
            nn.Linear(shapes.lm_width, shapes.lm_width),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Project `[images, patches, vision_width]` to `[images, patches / pool^2, lm_width]`."""
        grid = features.transpose(1, 2).unflatten(2, self.grid)
        return self.layers(avg_pool2d(grid, self.pool).flatten(2).transpose(1, 2))
