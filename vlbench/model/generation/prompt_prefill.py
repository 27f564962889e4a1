"""The prefill of one prompt, in pieces, between which other conversations are decoded."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from vlbench.compat.transformers_internals import kv_cache_layers
from vlbench.connector.base import ImagePlaces
from vlbench.connector.levels import Levels, concat_images, map_levels
from vlbench.data.packing import PackedBatch
from vlbench.model.generation.decoding_state import last_logits
from vlbench.model.generation.prefix_pool import KnownPrefix, PrefixPool
from vlbench.model.generation.row_cache import KeysValues
from vlbench.model.vlm import VLM


class PromptPrefill:
    """One prompt that is computed: first the views that are not known, then its positions."""

    def __init__(
        self, vlm: VLM, batch: PackedBatch, position_keys: Tensor, pool: PrefixPool
    ) -> None:
        """Begin behind what `pool` knows of the prompt.

        `batch` is the prompt, one row without padding on the model's device; `position_keys` are
        those of `prefix_pool.position_keys`.
        """
        self.vlm, self.batch, self.position_keys = vlm, batch, position_keys
        self.cache = DynamicCache(config=vlm.language.config)
        self.visual: Levels | None = None
        """Visual tokens of the views so far `[views, tokens, width]`; of the blank image where a
        connector that injects has none. None where nothing is encoded."""
        self.logits: Tensor | None = None
        """The last logits `[1, vocabulary]` once all positions are computed."""
        self._embeds: Tensor | None = None
        self._where: ImagePlaces | None = None
        prefix, self.cached_count = pool.find_prefix(position_keys)
        self._done_count = self.cached_count
        self._encoded_count = 0
        if prefix is not None:
            self._take_prefix(prefix)

    @property
    def length(self) -> int:
        """Positions of the prompt."""
        return len(self.position_keys)

    @property
    def keys_values(self) -> KeysValues:
        """Keys and values of the positions so far."""
        return [(layer.keys, layer.values) for layer in kv_cache_layers(self.cache)]

    @property
    def last_visual(self) -> Levels | None:
        """What the text behind the prompt sees: all views of the last image; None if nothing is
        injected."""
        if self.visual is None or self._where is None:
            return None
        bounds = self.batch.list_view_bounds()
        first = bounds[-2] if len(bounds) > 1 else 0
        return map_levels(lambda level: level[first:], self.visual)

    def advance(self, budget: int) -> int:
        """Encode views of images, or run positions, as many as `budget` allows but at least one.

        Return how many positions that took; a view counts as its patches.
        """
        missing = self._view_count() - self._encoded_count
        if missing:
            patches = self.vlm.shapes.patches
            count = min(missing, max(1, budget // patches))
            self._encode_views(count)
            return count * patches
        if self._embeds is None:
            self._embeds = self._merge_embeddings()
            self._where = self.vlm.image_places(self.batch)
        return self._run_positions(self._embeds, max(1, budget))

    def _take_prefix(self, prefix: KnownPrefix) -> None:
        count = self.cached_count
        for index, (keys, values) in enumerate(prefix.keys_values):
            self.cache.update(keys[:, :, :count], values[:, :, :count], index)
        known = self._count_whole_views(count)
        if known and prefix.visual is not None:
            self.visual = map_levels(lambda level: level[:known], prefix.visual)
            self._encoded_count = known

    def _count_whole_views(self, count: int) -> int:
        """Return the views of the images all of whose positions are among the first `count`."""
        later = (self.position_keys[count:] < 0).nonzero()
        if not len(later):
            return len(self.batch.pixels)
        return self.batch.list_view_bounds()[int(self.batch.image_index[0, count + later[0, 0]])]

    def _view_count(self) -> int:
        """Return how many views are encoded: a connector that injects needs a blank one."""
        return max(len(self.batch.pixels), bool(self.vlm.connector.inject_layers))

    def _encode_views(self, count: int) -> None:
        first = self._encoded_count
        more = self.vlm.encode_images(self.batch.from_image(first, first + count))
        self.visual = more if self.visual is None else concat_images(self.visual, more)
        self._encoded_count += count

    def _merge_embeddings(self) -> Tensor:
        """Return the embeddings `[1, length, lm_width]` of the prompt."""
        if self.visual is None:
            embeds: Tensor = self.vlm.token_embedding(self.batch.input_ids)
            return embeds
        return self.vlm.merge_embeddings(self.batch, self.visual)

    def _run_positions(self, embeds: Tensor, budget: int) -> int:
        begin, end = self._done_count, min(self._done_count + budget, self.length)
        piece = slice(None), slice(begin, end)
        logits = last_logits(
            self.vlm,
            embeds[piece],
            self.visual,
            self._where and self._where.select(*piece),
            self.batch.position_ids[piece],
            torch.ones_like(self.batch.input_ids[:, :end]),
            self.cache,
        )
        self._done_count = end
        self.logits = logits if end == self.length else None
        return end - begin
