"""The question of each image: the text of the human turn that shows it, as a connector reads it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Question:
    """The questions of some images, in the language model's embeddings.

    What they are follows from the turn alone: not from other turns, the system prompt, the chat
    template or the samples beside it. Several images of a turn have the same.
    """

    embeddings: Tensor
    """`[images, length, lm_width]` without gradient, in the order of the text; what is behind
    `lengths` is padding, and must not change a result."""
    lengths: Tensor
    """`[images]` int64, 0 to `Connector.question_length`; 0 for a turn of images alone, a caption
    and the blank image of a micro-batch without images."""

    @property
    def mask(self) -> Tensor:
        """`[images, length]` bool, False at padding."""
        places = torch.arange(self.embeddings.shape[1], device=self.lengths.device)
        return places < self.lengths[:, None]
