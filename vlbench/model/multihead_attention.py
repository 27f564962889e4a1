"""Multi-head attention with separate query, key and value projections, for LoRA adapters.

`nn.MultiheadAttention` keeps the three in one matrix and never calls its output projection as a
module, so that an adapter cannot replace them. This module computes the same with four Linear
layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class SplitAttention(nn.Module):
    """The attention of a packed `nn.MultiheadAttention`, for batches `[images, tokens, width]`."""

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        """Take the weights out of `packed`."""
        super().__init__()
        width, self.num_heads = packed.embed_dim, packed.num_heads
        weights = packed.in_proj_weight.data.chunk(3)
        biases = packed.in_proj_bias.data.chunk(3)
        for name, weight, bias in zip("qkv", weights, biases, strict=True):
            self.add_module(f"{name}_proj", _build_linear(width, weight.clone(), bias.clone()))
        self.out_proj = _build_linear(width, packed.out_proj.weight.data, packed.out_proj.bias.data)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Attend; open_clip's blocks call it like `nn.MultiheadAttention`."""
        q, k, v = (
            self._split_heads(self.get_submodule(f"{name}_proj")(x))
            for name, x in zip("qkv", (query, key, value), strict=True)
        )
        out = scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None

    def _split_heads(self, hidden: Tensor) -> Tensor:
        """Turn `[images, tokens, width]` into `[images, heads, tokens, head width]`."""
        return torch.unflatten(hidden, -1, (self.num_heads, -1)).transpose(1, 2)

    def to_multihead_attention(self) -> nn.MultiheadAttention:
        """Return torch's module with these weights."""
        width = self.out_proj.weight.shape[0]
        with torch.device("meta"):
            packed = nn.MultiheadAttention(width, self.num_heads, batch_first=True)
        packed.load_state_dict(
            dict(pack_attention_state(dict(self.named_parameters()))), assign=True
        )
        return packed


def pack_attention_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state of `SplitAttention` under the names of `nn.MultiheadAttention`."""
    packed = {
        f"in_proj_{kind}": torch.cat([state[f"{name}_proj.{kind}"].data for name in "qkv"])
        for kind in ("weight", "bias")
    }
    return packed | {n: state[n] for n in ("out_proj.weight", "out_proj.bias")}


def _build_linear(width: int, weight: Tensor, bias: Tensor) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(width, width)
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer
