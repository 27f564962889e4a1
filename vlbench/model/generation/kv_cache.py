"""KV caches: of a conversation, from turn to turn, and of fixed length, for compiled steps."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from vlbench.compat.transformers_internals import (
    cache_argument_name,
    crop_kv_cache,
    kv_cache_layers,
    repeat_kv_cache,
)
from vlbench.connector.base import ImagePlaces
from vlbench.connector.levels import Levels, concat_images, map_levels
from vlbench.data.packing import PackedBatch
from vlbench.data.sample_encoding import IMAGE_TOKEN_INDEX
from vlbench.model.decoder_families import DecoderConfig
from vlbench.model.vlm import VLM

CACHE_ARGUMENT = cache_argument_name()


class PrefixCache:
    """KV cache and visual tokens of one conversation; pass the same one at every turn.

    The prefix that a new prompt shares with the previous one is not run again, and an image is
    encoded once. Anything may change between turns: what differs is computed anew.
    """

    def __init__(self) -> None:
        """Begin with an empty cache."""
        self.clear_cache()

    def clear_cache(self) -> None:
        """Forget the conversation."""
        self.kv_cache: DynamicCache | None = None
        self._input_ids: list[int] = []
        self._pixels: Tensor | None = None
        self._view_bounds: Tensor | None = None
        self._visual_index: Tensor | None = None
        self._questions: list[list[int]] = []
        self._visual_tokens: Levels | None = None

    @property
    def position_count(self) -> int:
        """Positions that the conversation takes, its last token included; 0 at the start."""
        return len(self._input_ids) + 1 if self._input_ids else 0

    def encode_images(self, vlm: VLM, batch: PackedBatch) -> Levels:
        """Return the visual tokens of a batch of one conversation `[views, tokens, width]`."""
        known = self._count_known_views(batch)
        if not known:
            self._input_ids = []  # the image positions of other images have the same ids
            visual = vlm.encode_images(batch)
        elif known == len(batch.pixels):
            assert self._visual_tokens is not None
            visual = map_levels(lambda level: level[:known], self._visual_tokens)
        else:
            assert self._visual_tokens is not None
            new = vlm.encode_images(batch.from_image(known))
            visual = concat_images(self._visual_tokens, new)
        self._pixels, self._visual_tokens = batch.pixels, visual
        self._view_bounds, self._visual_index = batch.view_bounds, batch.visual_index
        self._questions = batch.question_rows()
        return visual

    def _count_known_views(self, batch: PackedBatch) -> int:
        """Return how many views are known; 0 unless all earlier images are there again.

        An image that is asked another question, of a connector that reads it, is another one; so is
        one whose tokens stand in another order.
        """
        before = self._pixels
        if before is None or not len(before) or len(before) > len(batch.pixels):
            return 0
        same = before.shape[1:] == batch.pixels.shape[1:]
        same = same and batch.question_rows()[: len(before)] == self._questions
        same = same and _begins_with(batch.view_bounds, self._view_bounds)
        same = same and _begins_with(batch.visual_index, self._visual_index)
        return len(before) if same and torch.equal(before, batch.pixels[: len(before)]) else 0

    def reuse_prefix(self, vlm: VLM, batch: PackedBatch) -> tuple[DynamicCache, int]:
        """Return the cache and how many positions of the prompt it holds; drop what differs.

        The last position is always run again: its hidden state gives the first new token.
        """
        input_ids = batch.input_ids[0].tolist()
        common = 0
        for token_id, cached_id in zip(input_ids[:-1], self._input_ids, strict=False):
            if token_id != cached_id:
                break
            common += 1
        if self.kv_cache is None or not common:
            self.kv_cache, common = DynamicCache(config=vlm.language.config), 0
        elif self.kv_cache.get_seq_length() > common:
            crop_kv_cache(self.kv_cache, common)
        self._input_ids = input_ids
        return self.kv_cache, common

    def append_generated(self, new_ids: list[int]) -> None:
        """Add a generated answer: all of it but the last token is in the cache."""
        self._input_ids = [*self._input_ids, *new_ids[:-1]]


def _begins_with(values: Tensor | None, beginning: Tensor | None) -> bool:
    """Tell whether `values` begin with `beginning`; None with None alone."""
    if values is None or beginning is None:
        return values is beginning
    return torch.equal(values[: len(beginning)], beginning)


def common_prefix_length(batch: PackedBatch) -> int:
    """Return how many tokens all prompts of a batch begin with, before any image position.

    0 for a single prompt, which shares nothing. The last position of a prompt is never counted: its
    hidden state gives the first new token.
    """
    if len(batch.input_ids) == 1:
        return 0
    lengths = [row[-1] for row in batch.sample_lengths]
    longest_prefix = min(lengths) - 1
    prompts = torch.stack(
        [
            row_ids[len(row_ids) - length :][:longest_prefix]
            for row_ids, length in zip(batch.input_ids, lengths, strict=True)
        ]
    )
    differs = (prompts != prompts[0]).any(0) | (prompts[0] == IMAGE_TOKEN_INDEX)
    return int(differs.long().cumsum(0).eq(0).sum())


def prefill_common_prefix(
    vlm: VLM,
    batch: PackedBatch,
    visual: Levels,
    embeds: Tensor,
    where: ImagePlaces | None,
    prefix_length: int,
) -> DynamicCache:
    """Return the cache after the tokens that all prompts begin with, run once for all rows.

    They stand at the left of every row, before its padding.

    Args:
        vlm: The model.
        batch: Prompts, padded on the left.
        visual: Their visual tokens, or levels of them.
        embeds: Their embeddings `[rows, length, lm_width]`.
        where: Their places `[rows, length]`; None if nothing is injected.
        prefix_length: Positions of what the prompts have in common.
    """
    cache = DynamicCache(config=vlm.language.config)
    if prefix_length:
        padding = embeds.shape[1] - batch.sample_lengths[0][-1]
        prefix = (slice(1), slice(padding, padding + prefix_length))
        vlm.run_decoder(
            embeds[prefix],
            visual,
            where and where.select(*prefix),
            position_ids=batch.position_ids[prefix],
            use_cache=True,
            **{CACHE_ARGUMENT: cache},
        )
        repeat_kv_cache(cache, len(embeds))
    return cache


def to_static_cache(cache: DynamicCache, config: DecoderConfig, max_length: int) -> StaticCache:
    """Copy a growing cache into a cache of `max_length` positions, allocated as a whole.

    The growing cache is emptied layer by layer, so that there are never two whole caches at once.
    """
    static_cache = StaticCache(config=config, max_cache_len=max_length)
    layers = kv_cache_layers(cache)
    for layer_index in range(len(layers)):
        layer = layers.pop(0)
        static_cache.update(layer.keys, layer.values, layer_index)
    return static_cache
