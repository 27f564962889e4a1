"""The rows of a batch while they are read: prompts first, then one token more at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlbench.compat.transformers_internals import cache_argument_name

if TYPE_CHECKING:
    from vlbench.model.vlm import VLM

CACHE_ARGUMENT = cache_argument_name()


@dataclass
class DecodingState:
    """Rows with a cache that grows with what is read."""

    vlm: VLM
    visual: Tensor
    """`[images, tokens, width]`"""
    image_index: Tensor
    """Indices of pictures `[rows, length]` for the positions read next, -1 for none."""
    position_ids: Tensor
    """`[rows, length]`, of the positions read next."""
    attention_mask: Tensor
    """`[rows, all positions]`, those read next included: 1 where a token is, 0 for padding."""
    kv_cache: Any
    """A cache of transformers with what was read."""

    def decode_embeddings(self, embeds: Tensor) -> Tensor:
        """Read `embeds` `[rows, length, lm_width]`; return the last logits `[rows, vocabulary]`."""
        hidden = self.vlm.run_decoder(
            embeds,
            self.visual,
            self.image_index,
            position_ids=self.position_ids,
            attention_mask=self.attention_mask,
            use_cache=True,
            **{CACHE_ARGUMENT: self.kv_cache},
        ).last_hidden_state
        return self.vlm.language.lm_head(hidden[:, -1])

    def decode_next(self, token_ids: Tensor) -> Tensor:
        """Read one token more in every row, `ids` `[rows]`; return logits `[rows, vocabulary]`."""
        self.image_index, self.position_ids = (
            self.image_index[:, -1:],
            self.position_ids[:, -1:] + 1,
        )
        self.attention_mask = torch.cat(
            [self.attention_mask, self.attention_mask.new_ones(len(token_ids), 1)], dim=1
        )
        return self.decode_embeddings(self.vlm.language.get_input_embeddings()(token_ids[:, None]))
