"""Honeybee's C-Abstractor (Cha et al. 2023, arXiv:2312.06742).

ResNet blocks, adaptive average pooling to a grid of tokens, ResNet blocks, then an MLP: fewer
tokens that keep the spatial layout. The blocks are timm's RegNet bottlenecks with
squeeze-and-excitation, as in the paper's code.
"""

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vlbench.compat.vision_internals import timm_regnet_stage
from vlbench.connector.base import Connector, Shapes


class CAbstractor(Connector):
    """`side` x `side` tokens per image, from convolutions with `width` channels."""

    size_options = {
        "side": range(1, 33),
        "depth": (1, 2, 3, 4, 6),
        "width": (64, 128, 256, 384, 512, 768, 1024, 1280, 1536, 2048),
    }

    def __init__(self, shapes: Shapes, side: int = 12, depth: int = 3, width: int = 1024) -> None:
        """Build the blocks, `depth` before and `depth` after the pooling."""
        super().__init__()
        for name, value in (("side", side), ("depth", depth), ("width", width)):
            if value < 1:
                raise ValueError(f"connector c_abstractor: {name} is {value}; at least 1 is needed")
        if side > min(shapes.grid):
            raise ValueError(
                f"connector c_abstractor: side is {side}; an image has {shapes.grid[0]} x "
                f"{shapes.grid[1]} patches, so at most {min(shapes.grid)} is allowed"
            )
        self.grid, self.tokens_per_image = shapes.grid, side**2
        self.token_grid = (side, side)
        self.positions = nn.Parameter(torch.zeros(1, shapes.patches, shapes.vision_width))
        # LayerNorm: with BatchNorm an image's tokens would depend on the other images of the batch
        layers: dict[str, Any] = {"act_layer": nn.SiLU, "norm_layer": LayerNorm2d}
        build_stage = timm_regnet_stage()
        self.before = build_stage(depth, shapes.vision_width, width, stride=1, dilation=1, **layers)
        self.pool = nn.AdaptiveAvgPool2d(side)
        self.after = build_stage(depth, width, width, stride=1, dilation=1, **layers)
        self.readout = nn.Sequential(
            nn.Linear(width, shapes.lm_width),
            nn.SiLU(),
            nn.Linear(shapes.lm_width, shapes.lm_width),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Project `[images, patches, vision_width]` to `[images, side^2, lm_width]`."""
        grid = (features + self.positions).transpose(1, 2).unflatten(2, self.grid)
        pooled = self.after(self.pool(self.before(grid.contiguous())))
        return self.readout(pooled.flatten(2).transpose(1, 2))

    def adapt(self, old_state: Mapping[str, Tensor], old_shapes: Shapes) -> Mapping[str, Tensor]:
        """Interpolate the position embeddings to the new grid of patches."""
        grid = old_state["positions"].transpose(1, 2).unflatten(2, old_shapes.grid)
        new = interpolate(grid, self.grid, mode="bicubic", antialias=True)
        return {**old_state, "positions": new.flatten(2).transpose(1, 2)}
