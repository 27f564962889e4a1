"""What prompts begin with, kept: keys and values of conversations that may go on.

A prompt that begins as one before it, with the same images, is not computed again up to where they
differ: an earlier turn of the conversation, or a system prompt that all have.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from vlbench.connector.levels import Levels, as_levels
from vlbench.data.packing import PackedBatch
from vlbench.data.sample_encoding import IMAGE_TOKEN_INDEX
from vlbench.model.generation.row_cache import KeysValues


@dataclass(frozen=True)
class KnownPrefix:
    """What was computed for the beginning of a prompt; its tensors are never written to."""

    position_keys: Tensor
    """`[length]`, see `position_keys`."""
    keys_values: KeysValues
    """`[1, heads, length, head width]` of each layer."""
    visual: Levels | None
    """Visual tokens of its images `[views, tokens, width]`; None where none were encoded."""

    @functools.cached_property
    def position_count(self) -> int:
        """Positions whose keys and values take as much memory as all of it."""
        sizes = [keys.numel() + values.numel() for keys, values in self.keys_values]
        per_position = sum(sizes) // len(self.position_keys)
        visual = [] if self.visual is None else as_levels(self.visual)
        visual_size = sum(level.numel() for level in visual)
        return len(self.position_keys) + -(-visual_size // per_position)


class PrefixPool:
    """Prefixes by last use, as many as fit; those that were not used for longest are dropped."""

    def __init__(self, max_positions: int) -> None:
        """Keep prefixes that together take at most `max_positions`; 0 keeps none."""
        self.max_positions = max_positions
        self.position_count = 0
        """Positions that all prefixes take."""
        self._prefixes: list[KnownPrefix] = []  # the last used one at the end

    def find_prefix(self, keys: Tensor) -> tuple[KnownPrefix | None, int]:
        """Return the prefix that shares most positions with a prompt of `keys`, and how many.

        The last position of the prompt is never shared: its hidden state gives the first new token.
        """
        shared = [_common_length(keys[:-1], prefix.position_keys) for prefix in self._prefixes]
        most = max(shared, default=0)
        if not most:
            return None, 0
        prefix = self._prefixes.pop(shared.index(most))
        self._prefixes.append(prefix)
        return prefix, most

    def add_prefix(self, prefix: KnownPrefix) -> None:
        """Keep a prefix; those that it begins with, and the oldest that find no room, are dropped.

        One that is too large for the pool is not kept.
        """
        if prefix.position_count > self.max_positions:
            return
        kept = [
            other
            for other in self._prefixes
            if _common_length(prefix.position_keys, other.position_keys) < len(other.position_keys)
        ]
        self._prefixes = [*kept, prefix]
        counts = [kept_prefix.position_count for kept_prefix in self._prefixes]
        self.position_count = sum(counts)
        while self.position_count > self.max_positions:
            self.position_count -= counts.pop(0)
            self._prefixes.pop(0)

    def clear(self) -> None:
        """Drop all prefixes."""
        self._prefixes, self.position_count = [], 0


def position_keys(batch: PackedBatch) -> Tensor:
    """Return keys `[length]` of the positions of one prompt, on the CPU: its token ids.

    At image positions they are negative and stand for the whole image: the pixels of its views, the
    order of their tokens, and its question. So prompts with the same keys have the same keys and
    values, also where text looks at views whose tokens come later.
    """
    keys, is_image = batch.input_ids[0].clone(), batch.input_ids[0] == IMAGE_TOKEN_INDEX
    image_index = batch.image_index[0, is_image]
    questions = batch.question_rows() or [[]] * len(batch.pixels)
    bounds, digests = batch.list_view_bounds(), []
    for image, (first, end) in enumerate(itertools.pairwise(bounds)):
        order = batch.visual_index
        told = questions[first], [] if order is None else order[image_index == image].tolist()
        digests.append(_image_key(batch.pixels[first:end], told))
    keys[is_image] = torch.tensor(digests, dtype=torch.long)[image_index]
    return keys


def _image_key(pixels: Tensor, told: tuple[list[int], list[int]]) -> int:
    """Return a negative number of 63 bits for the views of an image, and what is told of it."""
    digest = hashlib.blake2b(pixels.contiguous().numpy().tobytes(), digest_size=8)
    digest.update(repr(told).encode())
    return -1 - (int.from_bytes(digest.digest(), "big") >> 1)


def _common_length(keys: Tensor, others: Tensor) -> int:
    """Return how many keys two prompts have in common at their beginning."""
    length = min(len(keys), len(others))
    # numpy: each call of torch takes as long as the comparison
    differs = keys.numpy()[:length] != others.numpy()[:length]
    return int(differs.argmax()) if differs.any() else length
