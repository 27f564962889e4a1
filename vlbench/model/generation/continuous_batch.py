"""Answers of different conversations that are decoded together, one token of each in a step.

A row joins when its prompt is computed, and leaves when its answer is done, between any two steps.
Steps are eager, or have fixed shapes and are compiled (`fixed_steps.py`).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from vlbench.connector.base import ImagePlaces
from vlbench.connector.levels import Levels, concat_images, first_level
from vlbench.model.generation.decoding_state import (
    CompiledDecodeStep,
    has_layer_hooks,
    last_logits,
)
from vlbench.model.generation.fixed_steps import FixedSteps
from vlbench.model.generation.prefix_pool import KnownPrefix
from vlbench.model.generation.prompt_prefill import PromptPrefill
from vlbench.model.generation.row_cache import CacheView, RowCache
from vlbench.model.generation.token_sampling import RowSampler, sample_rows
from vlbench.model.vlm import VLM


class BatchRow:
    """One answer among those that are decoded together."""

    def __init__(self, prefill: PromptPrefill, sampler: RowSampler, token_id: int) -> None:
        """Go on behind a prompt with the first token of its answer."""
        self.sampler = sampler
        self.token_id = token_id
        """The id that was chosen last, which the next step runs; NONFINITE_ID where no logit was
        finite."""
        self.position_keys, self.visual = prefill.position_keys, prefill.visual
        self.last_visual, self.sees_image = prefill.last_visual, len(prefill.batch.pixels) > 0


class InjectedImages(NamedTuple):
    """What a connector that injects is given in a step."""

    visual: Levels
    """The last image of each row `[views, tokens, width]`: text sees no earlier one, so that rows
    bring one image each; of a row without images the blank one, which nothing sees."""
    where: ImagePlaces
    """Places `[rows, 1]`."""


class ContinuousBatch:
    """The rows that are decoded together, and their KV cache."""

    def __init__(
        self,
        vlm: VLM,
        vocabulary: int,
        max_rows: int,
        decode_step: CompiledDecodeStep | None = None,
    ) -> None:
        """Decode with `vlm`, in evaluation mode; ids from `vocabulary` on are never chosen.

        Steps are compiled with `decode_step`, one of any shape; None compiles nothing, and neither
        is a step where layers have hooks, as what is injected differs from row to row.
        """
        self.vlm, self.vocabulary = vlm, vocabulary
        self.rows: list[BatchRow] = []
        self._cache = RowCache(max_rows, vlm.device)
        self._fixed_steps: FixedSteps | None = None
        if decode_step is not None and not has_layer_hooks(vlm):
            self._fixed_steps = FixedSteps(vlm, decode_step, max_rows)
        self._images: InjectedImages | None = None

    @property
    def is_compiled(self) -> bool:
        """Whether steps are compiled."""
        return self._fixed_steps is not None

    def has_room(self, row_count: int, longest_row: int) -> bool:
        """Tell whether memory is left for so many rows, of which the last one is to join.

        `longest_row` is the greatest length that any of them may get. On a CPU, and of the first
        row, whose size is not known, nothing is checked.
        """
        free_bytes = _free_bytes(self.vlm.device)
        # the prompt has a cache of its own until it joins, and its prefix may be kept
        needed_bytes = self._cache.bytes_to_grow(row_count, longest_row)
        needed_bytes += 2 * longest_row * self._cache.bytes_per_position()
        return free_bytes is None or needed_bytes <= free_bytes

    def add_row(self, prefill: PromptPrefill, sampler: RowSampler) -> BatchRow:
        """Choose the first token behind a prompt that is computed, and let its answer join."""
        assert prefill.logits is not None
        row = BatchRow(prefill, sampler, *self._choose_ids(prefill.logits, [sampler]))
        self._cache.add_row(prefill.keys_values)
        self.rows.append(row)
        self._images = None
        return row

    def remove_row(self, row: BatchRow) -> None:
        """Let a row leave; the last one takes its number."""
        number = self.rows.index(row)
        self._cache.remove_row(number)
        self.rows[number] = self.rows[-1]
        self.rows.pop()
        self._images = None

    def copy_prefix(self, row: BatchRow, new_ids: list[int]) -> KnownPrefix:
        """Return what a row has computed, for prompts that begin so; `new_ids` are its answer."""
        answer = new_ids[: len(new_ids) - 1]  # the last one was not run
        keys = torch.cat([row.position_keys, torch.tensor(answer, dtype=torch.long)])
        visual = row.visual if row.sees_image else None
        return KnownPrefix(keys, self._cache.copy_row(self.rows.index(row)), visual)

    def step(self) -> None:
        """Run the last token of every row, and choose its next one.

        Where it raises nothing has changed but the samplers' generators.
        """
        token_ids = [row.token_id for row in self.rows]
        if self._fixed_steps is not None:
            logits = self._fixed_steps.run(self._cache.begin_fixed_step(), token_ids)
        else:
            logits = self._run_eager(self._cache.begin_step(), token_ids)
        next_ids = self._choose_ids(logits, [row.sampler for row in self.rows])
        self._cache.end_step()
        for row, token_id in zip(self.rows, next_ids, strict=True):
            row.token_id = token_id

    def _run_eager(self, view: CacheView, token_ids: list[int]) -> Tensor:
        """Return logits `[rows, vocabulary]` behind the last tokens of all rows."""
        if self._images is None and self.vlm.connector.inject_layers:
            self._images = self._join_images()
        visual, where = self._images or (None, None)
        position_ids, mask = view.next_positions()
        ids = torch.tensor(token_ids, device=self.vlm.device)
        embeds = self.vlm.token_embedding(ids[:, None])
        return last_logits(self.vlm, embeds, visual, where, position_ids, mask, view)

    def _choose_ids(self, logits: Tensor, samplers: list[RowSampler]) -> list[int]:
        ids: list[int] = sample_rows(logits[:, : self.vocabulary], samplers).tolist()
        return ids

    def _join_images(self) -> InjectedImages:
        visual: Levels | None = None
        view_counts = []
        for row in self.rows:
            assert row.last_visual is not None
            view_counts.append(len(first_level(row.last_visual)))
            visual = row.last_visual if visual is None else concat_images(visual, row.last_visual)
        assert visual is not None
        seen = [number if row.sees_image else -1 for number, row in enumerate(self.rows)]
        image_index = torch.tensor(seen, device=self.vlm.device)[:, None]
        none = torch.full_like(image_index, -1)
        if max(view_counts) == 1:
            return InjectedImages(visual, ImagePlaces(image_index, none))
        bounds = torch.tensor([0, *itertools.accumulate(view_counts)], device=self.vlm.device)
        return InjectedImages(visual, ImagePlaces(image_index, none, none, bounds))


def _free_bytes(device: torch.device) -> int | None:
    """Return the memory of a GPU that is left to this process; None for a CPU."""
    if device.type != "cuda":
        return None
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserved
