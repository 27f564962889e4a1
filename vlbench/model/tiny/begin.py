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

SPREAD, COMMON = 0.5, 0.25  # of the embeddings: deviation of an entry, and the part all share
ALIKE, PASS = 1.0, 0.7  # strength of "look at what resembles you" and of "pass it on"
BACK = (1, 2, 3)  # how many tokens the first heads of the first layer look back
NEAR, SLOW = 4, 5  # rotary pairs that tell near places apart; pairs from here on hardly turn


@torch.no_grad()
def begin(model: LlamaForCausalLM) -> None:
    """Set the embeddings and add to the attention of a new model; randomness is torch's own."""
    config: Any = model.config
    width, head = config.hidden_size, config.head_dim
    shared = torch.nn.functional.normalize(torch.randn(width), dim=0)
    embeddings = model.model.embed_tokens.weight
    embeddings.normal_(std=SPREAD).add_(COMMON * width**0.5 * shared)
    for number, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        query, key, value = (
            projection.weight.view(-1, head, width)  # [heads, head width, width]
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        output = attention.o_proj.weight.view(width, -1, head)  # [width, heads, head width]
        sharing = len(query) // len(key)
        if number == 0:
            _look_back(query, key, shared, config.rope_parameters["rope_theta"])
        for group in range(len(key)):
            heads = slice(group * sharing, (group + 1) * sharing)
            if number > 0:
                half = head // 2
                slow = [*range(SLOW, half), *range(half + SLOW, head)]
                like = ALIKE * _directions(len(slow), width)
                key[group, slow] += like
                query[heads, slow] += like
            passed = PASS * _directions(head, width)
            value[group] += passed
            output[:, heads] += passed.T[:, None]


def _look_back(query: Tensor, key: Tensor, shared: Tensor, theta: float) -> None:
    """Turn the queries so that they fit the keys of the token that stands so many places back."""
    half = query.shape[1] // 2
    turns = theta ** (-torch.arange(NEAR) / half)  # radians per token
    key[:, :NEAR] += shared
    for number, back in enumerate(BACK):
        query[number, :NEAR] += torch.cos(-back * turns)[:, None] * shared
        query[number, half : half + NEAR] += torch.sin(-back * turns)[:, None] * shared


def _directions(count: int, width: int) -> Tensor:
    """Draw `count` orthonormal directions, [count, width]."""
    basis: Any = torch.linalg.qr(torch.randn(width, count))
    return basis[0].T
