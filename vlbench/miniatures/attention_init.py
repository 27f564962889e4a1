"""Initialise the attention of the miniature language model so that it trains in minutes.

With random weights a small transformer soon learns which words occur in a text, and then needs
thousands of steps to learn which of them belong together. Here the attention begins with the
structure of trained models ("mimetic" initialisation: Trockman & Kolter, 2023, arXiv:2305.09828):
heads of the first layer attend one, two and three tokens back, heads of later layers attend to
tokens with similar hidden states, and values are copied to the output. All of it is then trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

# of the embeddings: standard deviation of an entry, and the scale of a direction common to all
EMBEDDING_STD, SHARED_SCALE = 0.5, 0.25
# scale of the query-key product that favours similar states, and of the value-output copy
SIMILARITY_STRENGTH, COPY_STRENGTH = 1.0, 0.7
LOOK_BACK_DISTANCES = (1, 2, 3)  # tokens back, for the first heads of the first layer
# rotary pairs that distinguish neighbouring positions; pairs from the second number on are nearly
# constant over a context
FAST_ROTARY_PAIRS, FIRST_SLOW_PAIR = 4, 5


@torch.no_grad()
def initialize_attention(model: LlamaForCausalLM) -> None:
    """Set embeddings and attention of a new model; uses torch's global random generator."""
    config: Any = model.config
    width, head = config.hidden_size, config.head_dim
    shared = torch.nn.functional.normalize(torch.randn(width), dim=0)
    embeddings = model.model.embed_tokens.weight
    embeddings.normal_(std=EMBEDDING_STD).add_(SHARED_SCALE * width**0.5 * shared)
    for number, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        query, key, value = (
            projection.weight.view(-1, head, width)  # [heads, head width, width]
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        output = attention.o_proj.weight.view(width, -1, head)  # [width, heads, head width]
        sharing = len(query) // len(key)
        if number == 0:
            _set_look_back_heads(query, key, shared, config.rope_parameters["rope_theta"])
        for group in range(len(key)):
            heads = slice(group * sharing, (group + 1) * sharing)
            if number > 0:
                half = head // 2
                slow = [*range(FIRST_SLOW_PAIR, half), *range(half + FIRST_SLOW_PAIR, head)]
                like = SIMILARITY_STRENGTH * _orthonormal_directions(len(slow), width)
                key[group, slow] += like
                query[heads, slow] += like
            passed = COPY_STRENGTH * _orthonormal_directions(head, width)
            value[group] += passed
            output[:, heads] += passed.T[:, None]


def _set_look_back_heads(
    query: Tensor, key: Tensor, shared_direction: Tensor, rope_theta: float
) -> None:
    """Rotate the queries so that they match the keys `LOOK_BACK_DISTANCES` tokens back."""
    half = query.shape[1] // 2
    turns = rope_theta ** (-torch.arange(FAST_ROTARY_PAIRS) / half)  # radians per token
    key[:, :FAST_ROTARY_PAIRS] += shared_direction
    for number, back in enumerate(LOOK_BACK_DISTANCES):
        query[number, :FAST_ROTARY_PAIRS] += torch.cos(-back * turns)[:, None] * shared_direction
        query[number, half : half + FAST_ROTARY_PAIRS] += (
            torch.sin(-back * turns)[:, None] * shared_direction
        )


def _orthonormal_directions(count: int, width: int) -> Tensor:
    """Draw `count` orthonormal directions, [count, width]."""
    basis: Tensor = torch.linalg.qr(torch.randn(width, count))[0]
    return basis.T
