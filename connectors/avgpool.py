"""Average pooling, then an MLP: DeCo (Yao et al. 2024, arXiv:2405.20985).

Neighbouring patches are averaged, so that a picture takes fewer tokens and none has to be learned
for that; an MLP as LLaVA-1.5's carries each mean into the language model.
"""

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from vlbench.connector.base import Connector, Shapes


class AvgPoolConnector(Connector):
    """The means of `pool` x `pool` patches, through Linear, GELU, Linear."""

    size_options = {"pool": (1, 2, 4, 8)}

    def __init__(self, shapes: Shapes, pool: int = 2) -> None:
        """Build the MLP; `pool` must divide rows and columns of the grid of patches."""
        super().__init__()
        rows, columns = self.grid = shapes.grid
        if pool < 1 or rows % pool or columns % pool:
            raise ValueError(
                f"connector avgpool: pool is {pool}, which must divide the grid of patches, "
                f"{rows} x {columns}"
            )
        self.pool = pool
        self.tokens_per_image = shapes.patches // pool**2
        self.layers = nn.Sequential(
            nn.Linear(shapes.vision_width, shapes.lm_width),
            nn.GELU(),
            nn.Linear(shapes.lm_width, shapes.lm_width),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Carry `[images, patches, vision_width]` to `[images, patches / pool^2, lm_width]`."""
        grid = features.transpose(1, 2).unflatten(2, self.grid)
        return self.layers(avg_pool2d(grid, self.pool).flatten(2).transpose(1, 2))
