"""InstructBLIP's Q-Former: the queries read the question before they become visual tokens.

Dai et al. 2023 (arXiv:2305.06500). It is BLIP-2's Q-Former (`qformer`), in whose self-attention
stand, behind the queries, the tokens of the human turn that shows the image; they have feed-forward
layers of their own, and read the image through the queries alone. So the tokens of an image differ
from question to question.

The reference reads the question with BERT's tokenizer and word embeddings. Here the language
model's embeddings of it are used, behind a LayerNorm and a Linear layer to the BERT's width, with
BERT's learned positions added.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlbench.connector import registry
from vlbench.connector.base import Connector, Shapes
from vlbench.connector.question import Question


class QuestionInput(nn.Module):
    """The language model's embeddings of a text as input of a BERT, before its LayerNorm."""

    def __init__(self, lm_width: int, width: int, length: int, spread: float) -> None:
        """Build the layers; `spread` is the standard deviation of BERT's embeddings at first."""
        super().__init__()
        self.norm = nn.LayerNorm(lm_width)  # whatever the scale of a language model's embeddings
        self.projection = nn.Linear(lm_width, width)
        self.positions = nn.Parameter(torch.randn(length, width) * spread)
        nn.init.normal_(self.projection.weight, std=spread / lm_width**0.5)
        nn.init.zeros_(self.projection.bias)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Turn `[images, length, lm_width]` into `[images, length, width]`."""
        projected: Tensor = self.projection(self.norm(embeddings))
        return projected + self.positions[: embeddings.shape[1]]


class PassedOn(nn.Module):
    """Returns the last of its arguments: the last layer's output at text, which nothing reads."""

    def forward(self, *states: Tensor) -> Tensor:
        """Return the last of `states`."""
        return states[-1]


class InstructQFormer(Connector):
    """`queries` tokens per image, from a BERT that reads the image and the question."""

    size_options = {
        "queries": [side**2 for side in range(2, 33)],
        "width": range(96, 1633, 96),
        "layers": (2, 3, 4, 6, 8, 10, 12, 16, 24),
        "ffn_width": (256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144),
    }

    def __init__(
        self,
        shapes: Shapes,
        queries: int = 32,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        cross_every: int = 2,
        ffn_width: int = 3072,
        question_length: int = 128,
    ) -> None:
        """Build the BERT.

        Args:
            shapes: Sizes of vision encoder and language model.
            queries: Learned queries, the visual tokens of an image.
            width: Width of the BERT.
            layers: Layers of the BERT.
            heads: Attention heads of a layer.
            cross_every: Every `cross_every`-th layer, from the first, attends to the image.
            ffn_width: Width of the feed-forward layers.
            question_length: Tokens of the question that are read; 128 in the reference.
        """
        super().__init__()
        if question_length < 1:
            raise ValueError(
                f"connector instruct_qformer: question_length is {question_length}; it must be at "
                "least 1 (connector qformer reads no question)"
            )
        blip2 = registry.load_connector("qformer")
        inner: Any = blip2(shapes, queries, width, layers, heads, cross_every, ffn_width)
        self.tokens_per_image, self.class_token = queries, inner.class_token
        self.question_length = question_length
        self.query_tokens, self.ln_vision = inner.query_tokens, inner.ln_vision
        self.qformer, self.projection = inner.qformer, inner.projection
        *read, last = self.qformer.encoder.layer
        for layer in read:  # queries and text have feed-forward layers of their own
            layer.intermediate = copy.deepcopy(layer.intermediate_query)
            layer.output = copy.deepcopy(layer.output_query)
        last.intermediate, last.output = PassedOn(), PassedOn()
        spread = self.qformer.config.initializer_range
        self.text = QuestionInput(shapes.lm_width, width, question_length, spread)

    def forward(self, features: Tensor, question: Question) -> Tensor:
        """Turn `[images, 1 + patches, vision_width]` into `[images, queries, lm_width]`."""
        queries = self.query_tokens.expand(len(features), -1, -1)
        count = queries.shape[1]
        mask = torch.cat([question.mask.new_ones(len(features), count), question.mask], dim=1)
        states = self.qformer(
            query_embeds=torch.cat([queries, self.text(question.embeddings)], dim=1),
            query_length=count,
            attention_mask=mask[:, None, None],
            encoder_hidden_states=self.ln_vision(features),
        ).last_hidden_state
        return self.projection(states[:, :count])

    def patch_attention(self, features: Tensor, question: Question) -> Tensor:
        """Return the attention weights of the queries, `[images, queries, patches]`.

        Their attention to the class token is left out.
        """
        patches = slice(int(self.class_token), None)
        module = registry.connector_module("qformer")
        return module.query_attention(self.qformer, lambda: self(features, question), patches)

    def load_reference(self, weights: Mapping[str, Tensor]) -> set[str]:
        """Load InstructBLIP's or BLIP-2's weights, in the layout of LAVIS or of transformers.

        BERT's word embeddings are left out, and with them what the last layer makes of the text. A
        projection to a language model of another width keeps its values, as does what reads the
        language model's embeddings.
        """
        module = registry.connector_module("qformer")
        return module.load_blip2_weights(self, weights, self._own_name, self._fit_tensor)

    @property
    def ignored_reference_keys(self) -> str:  # type: ignore[override]
        """Names of the other parts of InstructBLIP, as of BLIP-2."""
        return registry.load_connector("qformer").ignored_reference_keys

    def _own_name(self, given: str) -> str:
        name: str = registry.connector_module("qformer").rename_reference_key(given)
        return name.replace("text.embeddings.position_embeddings.weight", "text.positions")

    def _fit_tensor(self, name: str, tensor: Tensor, _: Mapping[str, Tensor]) -> Tensor:
        """Cut position embeddings to `question_length`."""
        return tensor[: self.question_length] if name == "text.positions" else tensor
