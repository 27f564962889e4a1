"""CogVLM's gated MLP (Wang et al. 2023, arXiv:2311.03079).

Linear to the language model's width, LayerNorm, GELU, and a SwiGLU MLP of the language model's own
size; no biases. Learned begin and end tokens surround the patches of an image.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from vlbench.connector.base import Connector, Shapes


class GluConnector(Connector):
    """One token per patch, and two that mark the begin and the end of the image."""

    ignored_reference_keys = r".*"  # CogVLM has one state dict for all parts
    size_options = {"mlp_ratio": [n / 16 for n in range(1, 129)]}

    def __init__(self, shapes: Shapes, mlp_ratio: float = 2.6875) -> None:
        """Build the layers; `mlp_ratio` 2.6875 is 11008 / 4096, the MLP of Vicuna and Yi-6B."""
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
        """Project `[images, patches, vision_width]` to `[images, patches + 2, lm_width]`."""
        hidden = gelu(self.norm1(self.linear_proj(features)))
        tokens = self.dense_4h_to_h(silu(self.gate_proj(hidden)) * self.dense_h_to_4h(hidden))
        begin, end = (vector.expand(len(tokens), -1, -1) for vector in (self.boi, self.eoi))
        return torch.cat([begin, tokens, end], dim=1)

    def load_reference(self, weights: Mapping[str, Tensor]) -> set[str]:
        """Load `linear_proj.*`, `boi` and `eoi` from CogVLM's state dict."""
        prefix = "linear_proj."
        state = {k.removeprefix(prefix): weights[k] for k in weights if k.startswith(prefix)}
        state |= {name: weights[name] for name in ("boi", "eoi") if name in weights}
        return self.load_strict(state)
