"""Flamingo: a Perceiver resampler, and gated cross-attention before decoder layers.

Alayrac et al. 2022 (arXiv:2204.14198), as in OpenFlamingo (Awadalla et al. 2023, arXiv:2308.01390):
a view of an image becomes a fixed number of latents; before every `every`-th decoder layer, text
attends to the latents of all views of the nearest image before it. The gates are zero at first, so
that training starts from the plain language model. A view takes one image position.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from vlbench.connector.base import Connector, ImagePlaces, Shapes, attention_shares
from vlbench.model.cross_attention import attend_to_images

GATED_BLOCK_KEY = re.compile(r".*\.(\d+)\.gated_cross_attn_layer\.(.+)")
"""A name in OpenFlamingo's weights: decoder layer, and parameter of the block before it."""


def feed_forward(width: int, mult: int) -> nn.Sequential:
    """Return LayerNorm, Linear, GELU, Linear, without biases in the Linear layers."""
    inner = width * mult
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, inner, bias=False),
        nn.GELU(),
        nn.Linear(inner, width, bias=False),
    )


class PerceiverAttention(nn.Module):
    """Cross-attention from latents to image features and the latents themselves."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_media, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * head_width, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * head_width, bias=False)
        self.to_out = nn.Linear(heads * head_width, width, bias=False)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """Return the update `[images, latents, width]` of the latents, without the residual."""
        latents = self.norm_latents(latents)
        q = self.to_q(latents)
        k, v = self.to_kv(torch.cat([self.norm_media(features), latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        return self.to_out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class PerceiverResampler(nn.Module):
    """From any number of features to `latents` latents of the vision encoder's width."""

    def __init__(
        self, width: int, latents: int, depth: int, heads: int, head_width: int, mult: int
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(width, heads, head_width), feed_forward(width, mult)])
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        """Turn `[images, patches, width]` into `[images, latents, width]`."""
        latents = self.latents.expand(len(features), -1, -1)
        pairs: Any = self.layers
        for attend, feed in pairs:
            latents = latents + attend(features, latents)
            latents = latents + feed(latents)
        return self.norm(latents)


class MaskedCrossAttention(nn.Module):
    """Cross-attention from every position to all latents of the nearest image before it."""

    def __init__(self, width: int, visual_width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * head_width, bias=False)
        self.to_kv = nn.Linear(visual_width, 2 * heads * head_width, bias=False)
        self.to_out = nn.Linear(heads * head_width, width, bias=False)

    def forward(
        self, hidden: Tensor, visual: Tensor, image_index: Tensor, view_bounds: Tensor | None = None
    ) -> Tensor:
        """Return `[rows, length, width]`; exactly zero where `image_index` is -1."""
        q = self.to_q(self.norm(hidden)).unflatten(-1, (self.heads, -1))
        k, v = self.to_kv(visual).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return self.to_out(attend_to_images(q, k, v, image_index, view_bounds).flatten(2))


class GatedBlock(nn.Module):
    """Cross-attention and a feed-forward layer, each times tanh of a gate that starts at zero."""

    def __init__(
        self, width: int, visual_width: int, heads: int, head_width: int, mult: int
    ) -> None:
        super().__init__()
        self.attn = MaskedCrossAttention(width, visual_width, heads, head_width)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff = feed_forward(width, mult)
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(
        self, hidden: Tensor, visual: Tensor, image_index: Tensor, view_bounds: Tensor | None = None
    ) -> Tensor:
        """Return the new input `[rows, length, width]` of a decoder layer."""
        seen = self.attn(hidden, visual, image_index, view_bounds)
        hidden = hidden + self.attn_gate.tanh() * seen
        return hidden + self.ff_gate.tanh() * self.ff(hidden)


def gate_openings(blocks: nn.ModuleDict) -> dict[str, float]:
    """Return tanh of every gate, the factors of cross-attention and feed-forward layers.

    `blocks` are gated blocks by the number of the decoder layer that they precede.
    """
    return {
        f"gate_{kind}_{layer}": float(block.get_parameter(f"{kind}_gate").detach().tanh())
        for layer, block in blocks.items()
        for kind in ("attn", "ff")
    }


class FlamingoConnector(Connector):
    """Perceiver resampler of `depth` layers, gated blocks before every `every`-th decoder layer."""

    replaces_image_tokens = False
    ignored_reference_keys = r"(lang_encoder|vision_encoder)\..*"
    size_options = {
        "every": (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48),
        "latents": [side**2 for side in range(2, 33)],
        "depth": (1, 2, 3, 4, 6, 8, 12, 16, 24),
        "ff_mult": range(1, 9),
    }

    def __init__(
        self,
        shapes: Shapes,
        every: int = 4,
        latents: int = 64,
        depth: int = 6,
        heads: int = 8,
        head_width: int = 64,
        ff_mult: int = 4,
    ) -> None:
        """Build resampler and gated blocks.

        Args:
            shapes: Sizes of vision encoder and language model.
            every: A gated block is before every `every`-th decoder layer.
            latents: Latents of a view.
            depth: Layers of the resampler.
            heads: Attention heads of resampler and gated blocks.
            head_width: Width of a head; `heads` x `head_width` need not be the LM's width.
            ff_mult: Width of a feed-forward layer, as a multiple of its input's.
        """
        super().__init__()
        for name, value, most in (
            ("every", every, shapes.lm_layers),
            ("latents", latents, 4096),
            ("depth", depth, 100),
            ("heads", heads, 1024),
            ("head_width", head_width, 1024),
            ("ff_mult", ff_mult, 64),
        ):
            if not 1 <= value <= most:
                raise ValueError(f"connector flamingo: {name} is {value}; allowed are 1 to {most}")
        self.inject_layers = tuple(i for i in range(shapes.lm_layers) if (i + 1) % every == 0)
        width = shapes.vision_width
        self.perceiver = PerceiverResampler(width, latents, depth, heads, head_width, ff_mult)
        self.blocks = nn.ModuleDict(
            {
                str(layer): GatedBlock(shapes.lm_width, width, heads, head_width, ff_mult)
                for layer in self.inject_layers
            }
        )
        # initialised as an embedding
        self.image_embedding = nn.Parameter(torch.randn(shapes.lm_width) * 0.02)

    def forward(self, features: Tensor) -> Tensor:
        """Turn features `[images, patches, width]` into `[images, latents, width]`."""
        return self.perceiver(features)

    def inject(self, layer: int, hidden: Tensor, visual: Tensor, where: ImagePlaces) -> Tensor:
        """Add gated cross-attention to the nearest image before decoder layer `layer`."""
        return self.blocks[str(layer)](hidden, visual, where.image_index, where.view_bounds)

    def metrics(self) -> dict[str, float]:
        """Return `gate_attn_L` and `gate_ff_L`: tanh of the gates before decoder layer L.

        0, at the start of training, is closed; 1 and -1 are fully open.
        """
        return gate_openings(self.blocks)

    def patch_attention(self, features: Tensor) -> Tensor:
        """Return the attention weights of the latents, `[images, latents, patches]`.

        Their attention to the latents themselves is left out.
        """
        pairs: Any = self.perceiver.layers
        layers = [(attend.to_q, attend.to_kv) for attend, _ in pairs]
        patches = slice(features.shape[1])
        return attention_shares(layers, pairs[0][0].heads, lambda: self(features), patches)

    def load_reference(self, weights: Mapping[str, Tensor]) -> set[str]:
        """Load OpenFlamingo's weights: `perceiver.*` and `...N.gated_cross_attn_layer.*`.

        N is the decoder layer, whatever the language model calls its layers. OpenFlamingo's
        embedding of an image position is that of its `<image>` token, whose id the weights do not
        tell, so that `image_embedding` is loaded only if the weights have one by that name.
        """
        state = {name: weights[name] for name in weights if name.startswith("perceiver.")}
        for name in weights:
            match = GATED_BLOCK_KEY.fullmatch(name)
            if match:
                state[f"blocks.{match[1]}.{match[2]}"] = weights[name]
        layers = sorted({int(name.split(".")[1]) for name in state if name.startswith("blocks.")})
        if layers and tuple(layers) != self.inject_layers:
            raise ValueError(
                f"the weights have gated blocks before layers {layers}, and "
                f"connector.every asks for {list(self.inject_layers)}: their every is "
                f"{layers[0] + 1}"
            )
        name = (
            "image_embedding"  # of this connector alone: OpenFlamingo has a token in the vocabulary
        )
        state[name] = weights.get(name, self.image_embedding.data)
        self.load_strict(state)
        return set(state) - ({name} - set(weights))
