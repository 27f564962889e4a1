"""BLIP-2's Q-Former: learned queries read the picture and become a few tokens of the text.

Li et al. 2023 (arXiv:2301.12597), as LAVIS does it: a LayerNorm on the tower's tokens (the class
token included), a BERT whose queries attend to each other and, in every `cross_every`-th layer, to
the picture, and a Linear layer to the language model. The BERT is transformers' own, which
reproduces LAVIS. It begins with random weights unless `init` gives it BLIP-2's. Dropout is 0 where
LAVIS trains with 0.1, so that packing and accumulation do not change a step.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from vlbench.connector import Connector, Shapes

LAVIS = (
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
    (
        r"^Qformer\.bert\.encoder\.layer\.(\d+)\.(attention|crossattention)\.self\.",
        r"qformer.encoder.layer.\1.\2.attention.",
    ),
    (r"^Qformer\.bert\.encoder\.", "qformer.encoder."),
    (r"^(opt_proj|llm_proj|t5_proj|language_projection)\.", "projection."),
    (r"^vision_model\.post_layernorm\.", "ln_vision."),
)
"""From names of LAVIS, and of transformers' Blip2, to names of this file."""
OWN = re.compile(r"(query_tokens$|ln_vision\.|qformer\.|projection\.)")
TEXT = re.compile(r"\.layer\.\d+\.(intermediate|output)\.")  # the FFN of the text, not of queries


class QFormer(Connector):
    """`queries` tokens per picture, from a BERT of `layers` layers that is `width` wide."""

    class_token = True

    def __init__(
        self,
        shapes: Shapes,
        queries: int = 32,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        cross_every: int = 2,
        ffn_width: int = 3072,
    ) -> None:
        """Build the BERT; `cross_every` counts from the first layer, which reads the picture."""
        super().__init__()
        for name, value in (("queries", queries), ("layers", layers), ("ffn_width", ffn_width)):
            if value < 1:
                raise ValueError(f"connector qformer: {name} is {value}; it must be at least 1")
        if heads < 1 or width < 1 or width % heads:
            raise ValueError(f"connector qformer: heads={heads} must divide width={width}")
        if not 1 <= cross_every <= layers:
            raise ValueError(
                f"connector qformer: cross_every is {cross_every}; allowed are 1 to layers={layers}"
            )
        self.tokens_per_image = queries
        config = Blip2QFormerConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=ffn_width,
            cross_attention_frequency=cross_every,
            encoder_hidden_size=shapes.vision_width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            layer_norm_eps=1e-12,
        )
        config._attn_implementation = "sdpa"
        self.query_tokens = nn.Parameter(torch.randn(1, queries, width) * 0.02)
        self.ln_vision = nn.LayerNorm(shapes.vision_width)
        self.qformer = Blip2QFormerModel(config)
        self.projection = nn.Linear(width, shapes.lm_width)

    def forward(self, features: Tensor) -> Tensor:
        """Turn `[images, 1 + patches, vision_width]` into `[images, queries, lm_width]`."""
        out = self.qformer(
            query_embeds=self.query_tokens.expand(len(features), -1, -1),
            encoder_hidden_states=self.ln_vision(features),
        )
        return self.projection(out.last_hidden_state)

    def load_reference(self, weights: Mapping[str, Tensor]) -> None:
        """Load BLIP-2's weights, in the layout of LAVIS or of transformers.

        Tower, language model and the text side of the BERT are left out; so is a projection to a
        language model of another width, which then stays as it is.
        """
        state = {}
        for name, tensor in weights.items():
            for pattern, replacement in LAVIS:
                name = re.sub(pattern, replacement, name)
            if OWN.match(name) and not TEXT.search(name):
                state[name] = tensor
        own = self.state_dict()
        ours = len(own["projection.bias"])
        if len(state.get("projection.bias", ())) != ours:
            state |= {name: own[name] for name in ("projection.weight", "projection.bias")}
        for name, tensor in own.items():
            if name in state and state[name].shape != tensor.shape:
                raise ValueError(
                    f"connector qformer: {name} of the weights has shape "
                    f"{tuple(state[name].shape)}, needed is {tuple(tensor.shape)}"
                )
        self.load_state_dict(state)
