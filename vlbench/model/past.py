"""What has been read of a prompt already, and is not read again."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from vlbench.data.batch import Batch
from vlbench.data.sample import IMAGE

if TYPE_CHECKING:
    from vlbench.model.vlm import VLM


class Past:
    """Keys and values of one conversation, and its visual tokens; give the same one every turn.

    What a new prompt has in common with it from the beginning is not read again, and a picture is
    encoded once. Anything may change between turns: what differs is read anew.
    """

    def __init__(self) -> None:
        """Nothing was read yet."""
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.cache: DynamicCache | None = None
        self._ids: list[int] = []
        self._pixels: Tensor | None = None
        self._visual: Tensor | None = None

    @property
    def length(self) -> int:
        """How many positions the conversation takes, its last token included; 0 at the start."""
        return len(self._ids) + 1 if self._ids else 0

    def visual(self, vlm: VLM, batch: Batch) -> Tensor:
        """Return the visual tokens of a batch of one conversation `[images, tokens, width]`."""
        known = self._known(batch)
        if not known:
            self._ids = []  # the places of other pictures look alike
            visual = vlm.visual(batch)
        elif known == len(batch.pixels):
            assert self._visual is not None
            visual = self._visual[:known]
        else:
            new = vlm.visual(replace(batch, pixels=batch.pixels[known:]))
            visual = torch.cat([self._visual, new])  # type: ignore[list-item]
        self._pixels, self._visual = batch.pixels, visual
        return visual

    def _known(self, batch: Batch) -> int:
        """Return how many pictures are known; 0 unless all that were shown are shown again."""
        before = self._pixels
        if before is None or not len(before) or len(before) > len(batch.pixels):
            return 0
        same = before.shape[1:] == batch.pixels.shape[1:]
        return len(before) if same and torch.equal(before, batch.pixels[: len(before)]) else 0

    def begin(self, vlm: VLM, batch: Batch) -> int:
        """Return how many positions of the prompt are read already, and forget what differs.

        The last position is always read again: its hidden state gives the first new token.
        """
        ids = batch.ids[0].tolist()
        common = 0
        for one, other in zip(ids[:-1], self._ids, strict=False):
            if one != other:
                break
            common += 1
        if self.cache is None or not common:
            self.cache, common = DynamicCache(config=vlm.language.config), 0
        elif self.cache.get_seq_length() > common:
            self.cache.crop(common - self.cache.get_seq_length())  # negative: so many are removed
        self._ids = ids
        return common

    def wrote(self, new: list[int]) -> None:
        """Note what was written: all of it but the last token has been read."""
        self._ids = [*self._ids, *new[:-1]]


def common(batch: Batch) -> int:
    """Return how many tokens all prompts of a batch begin with, before any place.

    0 for a single prompt, which has nothing in common with others. The last position of a prompt is
    never counted: its hidden state gives the first new token.
    """
    if len(batch.ids) == 1:
        return 0
    lengths = [row[-1] for row in batch.lengths]
    most = min(lengths) - 1
    prompts = torch.stack(
        [ids[len(ids) - n :][:most] for ids, n in zip(batch.ids, lengths, strict=True)]
    )
    differs = (prompts != prompts[0]).any(0) | (prompts[0] == IMAGE)
    return int(differs.long().cumsum(0).eq(0).sum())
