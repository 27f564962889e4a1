"""Molmo's attention pooling (Deitke et al. 2024, arXiv:2409.17146).

The patches of a small window are pooled by multi-head attention whose query is their mean; a SwiGLU
MLP carries the pooled vector to the language model's width. The attention's four layers have
biases, the MLP has none.
"""

from torch import Tensor, nn
from torch.nn.functional import silu

from vlbench.connector.base import Connector, Shapes, attention_shares
from vlbench.connector.patch_windows import (
    attend_in_windows,
    check_window,
    split_windows,
    spread_shares,
    window_grid,
)


class AttentionPoolConnector(Connector):
    """One token for `window` x `window` patches, from attention of their mean to each of them."""

    size_options = {"window": (1, 2, 4, 8), "mlp_ratio": [n / 16 for n in range(1, 129)]}

    def __init__(
        self, shapes: Shapes, window: int = 2, head_width: int = 64, mlp_ratio: float = 2.6875
    ) -> None:
        """Build the layers; `window` must divide the grid, `head_width` the encoder's width.

        `mlp_ratio` 2.6875 is 11008 / 4096: the MLP is as wide as the language model's own.
        """
        super().__init__()
        width = shapes.vision_width
        check_window("attention_pool", "window", window, shapes.grid)
        if head_width < 1 or width % head_width:
            raise ValueError(
                f"connector attention_pool: head_width is {head_width}, which must divide the "
                f"vision encoder's width {width}"
            )
        if mlp_ratio <= 0:
            raise ValueError(
                f"connector attention_pool: mlp_ratio is {mlp_ratio}; it must be above 0"
            )
        inner = max(1, round(shapes.lm_width * mlp_ratio))
        self.grid, self.window, self.heads = shapes.grid, window, width // head_width
        self.tokens_per_image = shapes.patches // window**2
        self.token_grid = window_grid(shapes.grid, window)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, shapes.lm_width, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Turn `[images, patches, vision_width]` into `[images, patches / window^2, lm_width]`."""
        windows = split_windows(features, self.grid, self.window)
        queries = self.to_q(windows.mean(1, keepdim=True))
        out = attend_in_windows(queries, self.to_k(windows), self.to_v(windows), self.heads)
        pooled = self.to_out(out).reshape(-1, self.tokens_per_image, windows.shape[-1])
        return self.down_proj(silu(self.gate_proj(pooled)) * self.up_proj(pooled))

    def patch_attention(self, features: Tensor) -> Tensor:
        """Return the shares of the patches, `[images, tokens, patches]`; 0 outside the window."""
        shares = attention_shares([(self.to_q, self.to_k)], self.heads, lambda: self(features))
        return spread_shares(shares, self.grid, self.window)
