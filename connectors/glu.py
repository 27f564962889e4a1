"""CogVLM's gated MLP (Wang et al. 2023, arXiv:2311.03079).

Linear to the language model's width, LayerNorm, GELU, and a SwiGLU layer as wide as the language
model's own; no biases. Learned vectors stand before and after the patches of a picture.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from vlbench.connector.base import Connector, Shapes


class GluConnector(Connector):
    """One token per patch, and two that mark where the picture begins and ends."""

    ignored_reference_keys = r".*"  # of CogVLM's one state for all parts
    size_options = {"mlp_ratio": [n / 16 for n in range(1, 129)]}

    def __init__(self, shapes: Shapes, mlp_ratio: float = 2.6875) -> None:
        """Build the layer; `mlp_ratio` 2.6875 is 11008 / 4096, the MLP of Vicuna and Yi-6B."""
        super().__init__()
        if mlp_ratio <= 0:
            raise ValueError(f"connector glu: mlp_ratio is {mlp_ratio}; it must be above 0")
        width = shapes.lm_width
        inner = max(1, round(width * mlp_ratio))
        self.tokens_per_image = shapes.patches + 2
        self.linear_proj = nn.Linear(shapes.vision_width, width, bias=False)
        self.norm1 = nn.LayerNorm(width)
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.dense_h_to_4h = nn.Linear(width, inner, bias=False)
        self.dense_4h_to_h = nn.Linear(inner, width, bias=False)
        self.boi = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.eoi = nn.Parameter(torch.randn(1, 1, width) * 0.02)

    def forward(self, features: Tensor) -> Tensor:
        """Carry `[images, patches, vision_width]` to `[images, patches + 2, lm_width]`."""
        hidden = gelu(self.norm1(self.linear_proj(features)))
        tokens = self.dense_4h_to_h(silu(self.gate_proj(hidden)) * self.dense_h_to_4h(hidden))
        begin, end = (mark.expand(len(tokens), -1, -1) for mark in (self.boi, self.eoi))
        return torch.cat([begin, tokens, end], dim=1)

    def load_reference(self, weights: Mapping[str, Tensor]) -> set[str]:
        """Load CogVLM's weights: `linear_proj.*`, `boi` and `eoi`, of a state with other things."""
        start = "linear_proj."
        state = {k.removeprefix(start): weights[k] for k in weights if k.startswith(start)}
        state |= {name: weights[name] for name in ("boi", "eoi") if name in weights}
        return self.load_strict(state)
