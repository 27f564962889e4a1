"""Qwen-VL's resampler (Bai et al. 2023, arXiv:2308.12966).

One layer of cross-attention from learned queries to the patches. The queries have a grid of 2-D
sine position embeddings, which is interpolated to the grid of patches, so that a query and the
patches at the same point of the image have similar embeddings. An image takes one token per query.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention

from vlbench.connector.base import Connector, Shapes, attention_shares


def sine_positions(rows: int, columns: int, width: int) -> Tensor:
    """Return embeddings `[rows x columns, width]`: half encodes the row, half the column (MAE)."""
    quarter = width // 4
    rates = 10000.0 ** (-torch.arange(quarter) / quarter)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [index.flatten()[:, None] * rates for index in (row, column)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)


class ResamplerConnector(Connector):
    """`side` x `side` learned queries and one layer of cross-attention of the LM's width."""

    size_options = {"side": range(1, 33)}

    def __init__(self, shapes: Shapes, side: int = 16, heads: int = 32) -> None:
        """Build the layer; the LM's width must be divisible by `heads` and by 4."""
        super().__init__()
        width = shapes.lm_width
        if side < 1:
            raise ValueError(f"connector resampler: side is {side}; it must be at least 1")
        if heads < 1 or width % heads or width % 4:
            raise ValueError(
                f"connector resampler: heads is {heads}, which must divide the language model's "
                f"width {width}"
            )
        self.heads, self.tokens_per_image = heads, side**2
        self.query = nn.Parameter(torch.randn(side**2, width) * 0.02)
        self.kv_proj = nn.Linear(shapes.vision_width, width, bias=False)
        self.ln_q, self.ln_kv = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.ln_post = nn.LayerNorm(width, eps=1e-6)
        self.proj = nn.Linear(width, width, bias=False)
        positions = sine_positions(side, side, width)
        grid = positions.T.reshape(1, width, side, side)
        stretched = interpolate(grid, shapes.grid, mode="bicubic", align_corners=False)
        self.register_buffer("query_positions", positions, persistent=False)
        self.register_buffer("key_positions", stretched[0].flatten(1).T, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Turn `[images, patches, vision_width]` into `[images, side^2, lm_width]`."""
        values = self.ln_kv(self.kv_proj(features))
        queries = (self.ln_q(self.query) + self.query_positions).expand(len(features), -1, -1)
        q, k, v = self.to_q(queries), self.to_k(values + self.key_positions), self.to_v(values)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(self.ln_post(self.to_out(out)))

    def patch_attention(self, features: Tensor) -> Tensor:
        """Return the attention weights of the queries, `[images, side^2, patches]`."""
        return attention_shares([(self.to_q, self.to_k)], self.heads, lambda: self(features))
