"""The rows of a batch while they are read: prompts first, then one token more at a time."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LlamaModel

if TYPE_CHECKING:
    from vlbench.model.vlm import VLM

# transformers 5.24 renamed the argument that takes the cache
_RENAMED = "cache" in inspect.signature(LlamaModel.forward).parameters
CACHE = "cache" if _RENAMED else "past_key_values"


@dataclass
class Rows:
    """Rows with a cache that grows with what is read."""

    vlm: VLM
    visual: Tensor
    """`[images, tokens, width]`"""
    sees: Tensor
    """Indices of pictures `[rows, length]` for the positions read next, -1 for none."""
    positions: Tensor
    """`[rows, length]`, of the positions read next."""
    mask: Tensor
    """`[rows, all positions]`, those read next included: 1 where a token is, 0 for padding."""
    cache: Any
    """A cache of transformers with what was read."""

    def read(self, embeds: Tensor) -> Tensor:
        """Read `embeds` `[rows, length, lm_width]`; return the last logits `[rows, vocabulary]`."""
        hidden = self.vlm.read(
            embeds,
            self.visual,
            self.sees,
            position_ids=self.positions,
            attention_mask=self.mask,
            use_cache=True,
            **{CACHE: self.cache},
        ).last_hidden_state
        return self.vlm.language.lm_head(hidden[:, -1])

    def follow(self, ids: Tensor) -> Tensor:
        """Read one token more in every row, `ids` `[rows]`; return logits `[rows, vocabulary]`."""
        self.sees, self.positions = self.sees[:, -1:], self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], dim=1)
        return self.read(self.vlm.language.get_input_embeddings()(ids[:, None]))
