"""What has been read of a prompt already, and is not read again."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from vlbench.compat.transformers_internals import crop_kv_cache
from vlbench.data.packing import PackedBatch
from vlbench.data.sample_encoding import IMAGE_TOKEN_INDEX

if TYPE_CHECKING:
    from vlbench.model.vlm import VLM


class PrefixCache:
    """Keys and values of one conversation, and its visual tokens; give the same one every turn.

    What a new prompt has in common with it from the beginning is not read again, and a picture is
    encoded once. Anything may change between turns: what differs is read anew.
    """

    def __init__(self) -> None:
        """Nothing was read yet."""
        self.clear_cache()

    def clear_cache(self) -> None:
        """Begin anew."""
        self.kv_cache: DynamicCache | None = None
        self._input_ids: list[int] = []
        self._pixels: Tensor | None = None
        self._visual_tokens: Tensor | None = None

    @property
    def position_count(self) -> int:
        """How many positions the conversation takes, its last token included; 0 at the start."""
        return len(self._input_ids) + 1 if self._input_ids else 0

    def encode_images(self, vlm: VLM, batch: PackedBatch) -> Tensor:
        """Return the visual tokens of a batch of one conversation `[images, tokens, width]`."""
        known = self._count_known_images(batch)
        if not known:
            self._input_ids = []  # the places of other pictures look alike
            visual = vlm.visual(batch)
        elif known == len(batch.pixels):
            assert self._visual_tokens is not None
            visual = self._visual_tokens[:known]
        else:
            new = vlm.visual(replace(batch, pixels=batch.pixels[known:]))
            visual = torch.cat([self._visual_tokens, new])  # type: ignore[list-item]
        self._pixels, self._visual_tokens = batch.pixels, visual
        return visual

    def _count_known_images(self, batch: PackedBatch) -> int:
        """Return how many pictures are known; 0 unless all that were shown are shown again."""
        before = self._pixels
        if before is None or not len(before) or len(before) > len(batch.pixels):
            return 0
        same = before.shape[1:] == batch.pixels.shape[1:]
        return len(before) if same and torch.equal(before, batch.pixels[: len(before)]) else 0

    def reuse_prefix(self, vlm: VLM, batch: PackedBatch) -> int:
        """Return how many positions of the prompt are read already, and forget what differs.

        The last position is always read again: its hidden state gives the first new token.
        """
        ids = batch.input_ids[0].tolist()
        common = 0
        for one, other in zip(ids[:-1], self._input_ids, strict=False):
            if one != other:
                break
            common += 1
        if self.kv_cache is None or not common:
            self.kv_cache, common = DynamicCache(config=vlm.language.config), 0
        elif self.kv_cache.get_seq_length() > common:
            crop_kv_cache(self.kv_cache, common)
        self._input_ids = ids
        return common

    def append_generated(self, new_ids: list[int]) -> None:
        """Note what was written: all of it but the last token has been read."""
        self._input_ids = [*self._input_ids, *new_ids[:-1]]


def common_prefix_length(batch: PackedBatch) -> int:
    """Return how many tokens all prompts of a batch begin with, before any place.

    0 for a single prompt, which has nothing in common with others. The last position of a prompt is
    never counted: its hidden state gives the first new token.
    """
    if len(batch.input_ids) == 1:
        return 0
    lengths = [row[-1] for row in batch.sample_lengths]
    most = min(lengths) - 1
    prompts = torch.stack(
        [ids[len(ids) - n :][:most] for ids, n in zip(batch.input_ids, lengths, strict=True)]
    )
    differs = (prompts != prompts[0]).any(0) | (prompts[0] == IMAGE_TOKEN_INDEX)
    return int(differs.long().cumsum(0).eq(0).sum())
