"""Compiled steps of rows that come and go: of few shapes, whatever rows there are.

Rows and positions are rounded up, and what is not used is masked. So there are few graphs of the
compiler, and one CUDA graph for each shape as long as the cache stays where it is.
"""

from __future__ import annotations

from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from vlbench.model.generation.decoding_state import CompiledDecodeStep, capture_device
from vlbench.model.generation.row_cache import CacheView
from vlbench.model.generation.step_graph import StepGraph
from vlbench.model.vlm import VLM


class FixedSteps:
    """Runs one token of each row, at the shape of a view of their cache."""

    def __init__(self, vlm: VLM, decode_step: CompiledDecodeStep, max_rows: int) -> None:
        """Run the steps of at most `max_rows` rows with `decode_step`."""
        self._vlm, self._decode_step = vlm, decode_step
        self._token_buffer = torch.zeros(max_rows, dtype=torch.long, device=vlm.device)
        self._graphs: WeakKeyDictionary[CacheView, StepGraph] = WeakKeyDictionary()

    def run(self, view: CacheView, token_ids: list[int]) -> Tensor:
        """Run the last token of each row; return their logits `[rows, vocabulary]`.

        On a GPU the next call overwrites them.
        """
        padded = token_ids + [0] * (view.row_count - len(token_ids))
        self._token_buffer[: view.row_count] = torch.tensor(padded)
        if view not in self._graphs:
            self._graphs[view] = StepGraph(capture_device(self._vlm))
        return self._graphs[view].run(partial(self._launch, view))[: len(token_ids)]

    def _launch(self, view: CacheView) -> Tensor:
        """Launch a step; what it reads and writes stays where it is, for graphs of a GPU."""
        token_ids = self._token_buffer[: view.row_count]
        position_ids, mask = view.next_positions()
        return self._decode_step(self._vlm, token_ids, None, None, position_ids, mask, view)
