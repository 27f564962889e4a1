"""How the miniature language model begins: with attention that already does what attention is for.

From plain noise a small transformer soon learns which words occur in a text, and then takes
thousands of steps to learn which of them belong together. Here it begins as trained models look:
heads of the first layer look one, two and three tokens back, those of later layers at what
resembles them, and what is looked at is passed on as it is ("mimetic" weights: Trockman & Kolter,
2023, arXiv:2305.09828). All of it is trained on text afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

EMBEDDING_STD, SHARED_SCALE = (
    0.5,
    0.25,
)  # of the embeddings: deviation of an entry, and the part all share
SIMILARITY_STRENGTH, COPY_STRENGTH = (
    1.0,
    0.7,
)  # strength of "look at what resembles you" and of "pass it on"
LOOK_BACK_DISTANCES = (1, 2, 3)  # how many tokens the first heads of the first layer look back
FAST_ROTARY_PAIRS, FIRST_SLOW_PAIR = (
    4,
    5,
)  # rotary pairs that tell near places apart; pairs from here on hardly turn


@torch.no_grad()
def initialize_attention(model: LlamaForCausalLM) -> None:
    """Set the embeddings and add to the attention of a new model; randomness is torch's own."""
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
    """Turn the queries so that they fit the keys of the token that stands so many places back."""
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
    basis: Any = torch.linalg.qr(torch.randn(width, count))
    return basis[0].T
