"""Gated cross-attention to all patches, without a resampler: the vision adapter of Llama 3.

Grattafiori et al. 2024 (arXiv:2407.21783, section 7.2), as in Llama 3.2 Vision. A Linear layer
carries the patches to the language model's width. Before every `every`-th decoder layer the text
attends to all patches of all views of the nearest image before it (grouped queries, RMSNorm on
queries and keys), and a SwiGLU layer follows; both go through tanh gates that are zero at first, so
that training starts from the plain language model. A view takes one image position.

Keys and values are made in `forward`, a level for each of these layers: once for each view, in
training as in an answer of any length.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from vlbench.connector import registry
from vlbench.connector.base import Connector, ImagePlaces, Shapes
from vlbench.connector.levels import Levels, concat_channels
from vlbench.model.cross_attention import attend_to_images

NORM_EPSILON = 1e-5  # of Llama 3


class RMSNorm(nn.Module):
    """Root mean square normalisation, in 32 bits at least; the type of the input stays."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, values: Tensor) -> Tensor:
        """Normalise the last dimension."""
        wide = values.float() if values.dtype.itemsize < 4 else values
        scale = (wide.square().mean(-1, keepdim=True) + NORM_EPSILON).rsqrt()
        return (wide * scale * self.weight).to(values.dtype)


class KeysValues(nn.Module):
    """Keys and values of one layer, of every patch."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_k = nn.Linear(width, heads * head_width, bias=False)
        self.to_v = nn.Linear(width, heads * head_width, bias=False)
        self.k_norm = RMSNorm(head_width)

    def forward(self, patches: Tensor) -> Tensor:
        """Turn `[images, patches, width]` into keys and values, one behind the other."""
        keys = self.k_norm(self.to_k(patches).unflatten(-1, (self.heads, -1)))
        return torch.cat([keys.flatten(-2), self.to_v(patches)], dim=-1)


class GatedLayer(nn.Module):
    """Cross-attention and SwiGLU, each times tanh of a gate that starts at zero."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_width: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.norm, self.q_norm = RMSNorm(width), RMSNorm(head_width)
        self.to_q = nn.Linear(width, heads * head_width, bias=False)
        self.to_out = nn.Linear(heads * head_width, width, bias=False)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff_norm = RMSNorm(width)
        self.up = nn.Linear(width, hidden, bias=False)
        self.act = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(
        self, hidden: Tensor, keys_values: Tensor, image_index: Tensor, view_bounds: Tensor | None
    ) -> Tensor:
        """Return the new input `[rows, length, width]`; unchanged where `image_index` is -1."""
        query = self.q_norm(self.to_q(self.norm(hidden)).unflatten(-1, (self.heads, -1)))
        key, value = keys_values.unflatten(-1, (2, self.kv_heads, -1)).unbind(2)
        seen = attend_to_images(query, key, value, image_index, view_bounds)
        seen = self.to_out(seen.flatten(2))
        hidden = hidden + self.attn_gate.tanh() * seen
        normed = self.ff_norm(hidden)
        fed = self.down(silu(self.act(normed)) * self.up(normed))
        return hidden + self.ff_gate.tanh() * fed * (image_index >= 0)[..., None]


class CrossAttentionConnector(Connector):
    """Gated layers before every `every`-th decoder layer, which look at all patches."""

    replaces_image_tokens = False
    size_options = {
        "every": (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48),
        "mlp_ratio": [2.0**k * n / 8 for k in range(-5, 4) for n in range(8, 16)],
    }

    def __init__(
        self,
        shapes: Shapes,
        every: int = 4,
        heads: int = 32,
        kv_heads: int = 8,
        head_width: int = 128,
        mlp_ratio: float = 3.5,
        blocks: tuple[int, ...] = (),
    ) -> None:
        """Build the projection, keys and values, and the gated layers.

        Args:
            shapes: Sizes of vision encoder and language model.
            every: A gated layer is before every `every`-th decoder layer.
            heads: Attention heads.
            kv_heads: Heads of keys and values; must divide `heads`.
            head_width: Width of a head.
            mlp_ratio: Inner width of the SwiGLU, relative to the language model's: 14336 / 4096.
            blocks: Encoder blocks that are read beside `vision.layer`, from 0 or from -1, the last.
        """
        super().__init__()
        for name, option, most in (
            ("every", every, shapes.lm_layers),
            ("heads", heads, 1024),
            ("kv_heads", kv_heads, heads),
            ("head_width", head_width, 1024),
        ):
            if not 1 <= option <= most:
                raise ValueError(
                    f"connector cross_attention: {name} is {option}; allowed are 1 to {most}"
                )
        if heads % kv_heads:
            raise ValueError(
                f"connector cross_attention: kv_heads is {kv_heads}, which does not divide "
                f"heads={heads}"
            )
        if mlp_ratio <= 0:
            raise ValueError(
                f"connector cross_attention: mlp_ratio is {mlp_ratio}; it must be above 0"
            )
        self.latent_grid = shapes.grid
        self.inject_layers = tuple(i for i in range(shapes.lm_layers) if (i + 1) % every == 0)
        self.vision_layers = (shapes.vision_layer, *blocks) if blocks else ()
        width, hidden = shapes.lm_width, max(1, round(shapes.lm_width * mlp_ratio))
        self.proj = nn.Linear(shapes.vision_width * (1 + len(blocks)), width)
        self.keys_values: Any = nn.ModuleList(
            KeysValues(width, kv_heads, head_width) for _ in self.inject_layers
        )
        self.gated: Any = nn.ModuleDict(
            {
                str(layer): GatedLayer(width, heads, kv_heads, head_width, hidden)
                for layer in self.inject_layers
            }
        )
        # initialised as an embedding
        self.image_embedding = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, features: Levels) -> tuple[Tensor, ...]:
        """Return keys and values of each gated layer, `[images, patches, 2 x keys' width]`."""
        patches = self.proj(concat_channels(features))
        return tuple(make_both(patches) for make_both in self.keys_values)

    def inject(
        self, layer: int, hidden: Tensor, visual: tuple[Tensor, ...], where: ImagePlaces
    ) -> Tensor:
        """Let the text look at its image before decoder layer `layer`."""
        level = visual[self.inject_layers.index(layer)]
        return self.gated[str(layer)](hidden, level, where.image_index, where.view_bounds)

    def metrics(self) -> dict[str, float]:
        """Return `gate_attn_L` and `gate_ff_L`: tanh of the gates before decoder layer L."""
        openings: dict[str, float] = registry.connector_module("flamingo").gate_openings(self.gated)
        return openings
