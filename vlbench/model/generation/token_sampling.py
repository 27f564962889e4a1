"""The next token of each row from its logits: the likeliest, or drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NONFINITE_ID = -1
"""What is chosen instead of an id where no logit is finite."""


@dataclass(frozen=True)
class RowSampler:
    """How the tokens of one answer are chosen, whatever is decoded beside it."""

    temperature: float
    """0 for the likeliest token; otherwise the logits are divided by it and a token is drawn."""
    top_p: float
    """A token is drawn from the likeliest that together have this probability."""
    generator: torch.Generator
    """The answer's own, on the device of the logits."""


def sample_next_ids(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator
) -> Tensor:
    """Choose the next ids `[rows]` from logits `[rows, vocabulary]`: greedy at temperature 0.

    A row whose greatest logit is not finite gives NONFINITE_ID: the ids travel to the host anyway,
    so the device need not be waited for once more to know it.
    """
    if temperature == 0:
        return _likeliest_ids(logits)
    ordered, index, finite = _narrow_probabilities(logits, temperature, top_p)
    choice = torch.multinomial(ordered, 1, generator=generator)
    return index.gather(-1, choice).where(finite, NONFINITE_ID).squeeze(-1)


def sample_rows(logits: Tensor, samplers: Sequence[RowSampler]) -> Tensor:
    """Choose the next ids `[rows]` from logits `[rows, vocabulary]`, each row with its sampler.

    A row draws as `sample_next_ids` does for that row alone.
    """
    ids = _likeliest_ids(logits)
    drawn = [row for row, sampler in enumerate(samplers) if sampler.temperature]
    if not drawn:
        return ids
    temperature, top_p = (
        logits.new_tensor([[value] for value in values], dtype=torch.float32)
        for values in (
            [samplers[row].temperature for row in drawn],
            [samplers[row].top_p for row in drawn],
        )
    )
    ordered, index, finite = _narrow_probabilities(logits[drawn], temperature, top_p)
    choice = torch.stack(
        [
            torch.multinomial(probabilities, 1, generator=samplers[row].generator)
            for row, probabilities in zip(drawn, ordered, strict=True)
        ]
    )
    ids[drawn] = index.gather(-1, choice).where(finite, NONFINITE_ID).squeeze(-1)
    return ids


def _likeliest_ids(logits: Tensor) -> Tensor:
    ids = logits.argmax(-1)
    return ids.where(logits.gather(-1, ids[:, None])[:, 0].isfinite(), NONFINITE_ID)


def _narrow_probabilities(
    logits: Tensor, temperature: float | Tensor, top_p: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return probabilities `[rows, vocabulary]`, the greatest first, 0 beyond `top_p`; their ids.

    The third tensor `[rows, 1]` tells which rows are finite; the probabilities of others are
    anything that can be drawn from. Temperatures and `top_p` may be tensors `[rows, 1]`.
    """
    probabilities = (logits.float() / temperature).softmax(-1)
    ordered, index = probabilities.sort(-1, descending=True)
    finite = ordered[:, :1].isfinite()
    ordered = ordered.where(finite, 1.0)  # multinomial of nan on a GPU breaks the CUDA context
    beyond = ordered.cumsum(-1) - ordered >= top_p  # the token that crosses top_p stays
    beyond[:, 0] = False
    ordered[beyond] = 0
    return ordered, index, finite
