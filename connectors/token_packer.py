"""TokenPacker (Li et al. 2024, arXiv:2407.02392): coarse tokens that take in fine patches.

A low-resolution point of the image, interpolated from the features, is the query; the patches of
its region are keys and values, each through an MLP of their own. An MLP as in LLaVA-1.5 carries the
result to the language model's width.
"""

from torch import Tensor, nn

from vlbench.connector.base import Connector, Shapes, attention_shares
from vlbench.connector.patch_windows import (
    attend_in_windows,
    check_window,
    split_windows,
    spread_shares,
    window_grid,
)


class TokenPackerConnector(Connector):
    """One token for `scale` x `scale` patches, with attention of `width`."""

    size_options = {
        "scale": (1, 2, 4, 8),
        "width": (64, 128, 256, 384, 512, 768, 1024, 1280, 1536, 2048),
    }

    def __init__(
        self, shapes: Shapes, scale: int = 2, width: int = 1024, head_width: int = 128
    ) -> None:
        """Build the layers; `scale` must divide the grid, `head_width` the `width`."""
        super().__init__()
        check_window("token_packer", "scale", scale, shapes.grid)
        if head_width < 1 or width < 1 or width % head_width:
            raise ValueError(
                f"connector token_packer: head_width is {head_width}, which must divide width "
                f"{width}"
            )
        self.grid, self.scale, self.heads = shapes.grid, scale, width // head_width
        self.tokens_per_image = shapes.patches // scale**2
        self.token_grid = window_grid(shapes.grid, scale)
        self.query_proj = nn.Linear(shapes.vision_width, width, bias=False)
        self.key_proj, self.value_proj = (_mlp(shapes.vision_width, width) for _ in range(2))
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.layers = _mlp(width, shapes.lm_width)

    def forward(self, features: Tensor) -> Tensor:
        """Turn `[images, patches, vision_width]` into `[images, patches / scale^2, lm_width]`."""
        windows = split_windows(features, self.grid, self.scale)
        queries = self.to_q(self.ln_q(self.query_proj(self._interpolate(windows))))
        keys = self.to_k(self.ln_k(self.key_proj(windows)))
        values = self.to_v(self.ln_v(self.value_proj(windows)))
        out = self.to_out(attend_in_windows(queries, keys, values, self.heads))
        return self.layers(out.reshape(-1, self.tokens_per_image, out.shape[-1]))

    def _interpolate(self, windows: Tensor) -> Tensor:
        """Return the middle of each window, `[windows, 1, vision_width]`.

        It is bilinear interpolation to 1 / scale of the grid without a kernel that has no
        deterministic gradient: the mean of the 2 x 2 patches in the middle, or the one there.
        """
        middle = slice((self.scale - 1) // 2, self.scale // 2 + 1)
        squares = windows.unflatten(1, (self.scale, self.scale))
        return squares[:, middle, middle].mean((1, 2))[:, None]

    def patch_attention(self, features: Tensor) -> Tensor:
        """Return the shares of the patches, `[images, tokens, patches]`; 0 outside the region."""
        shares = attention_shares([(self.to_q, self.to_k)], self.heads, lambda: self(features))
        return spread_shares(shares, self.grid, self.scale)


def _mlp(width: int, out_width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, out_width), nn.GELU(), nn.Linear(out_width, out_width))
