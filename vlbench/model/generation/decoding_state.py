"""The rows of a batch during decoding: prefill, then one token per step, eager or compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from vlbench.compat.torch_internals import (
    COMPILER_NEEDS,
    compiler_settings,
    has_forward_hooks,
    is_compiler_error,
)
from vlbench.compat.transformers_internals import static_cache_position
from vlbench.connector.base import ImagePlaces
from vlbench.connector.levels import Levels
from vlbench.errors import UserError, one_line
from vlbench.model.generation.kv_cache import CACHE_ARGUMENT, to_static_cache
from vlbench.model.generation.row_cache import CacheView
from vlbench.model.generation.step_graph import StepGraph
from vlbench.model.vlm import VLM

LENGTH_MULTIPLE = 256
"""Static caches have multiples of this length: 16 shapes for the 4096 positions of Yi-VL, and at
most 255 positions that are not used."""
MAX_GRAPHS = 64
"""Shapes that are compiled at most, of all models of a process; torch allows 8 otherwise."""


@dataclass
class DecodingState:
    """Rows with a KV cache that grows with every token."""

    vlm: VLM
    visual: Levels
    """`[views, tokens, width]`, or levels of it."""
    where: ImagePlaces | None
    """Places `[rows, length]` of the positions that come next; None if nothing is injected."""
    position_ids: Tensor
    """`[rows, length]`, of the positions that come next."""
    attention_mask: Tensor
    """`[rows, all positions]`, those that come next included: 1 for a token, 0 for padding."""
    kv_cache: DynamicCache
    """Keys and values of the positions before."""

    @functools.cached_property
    def text_places(self) -> ImagePlaces | None:
        """Places `[rows, 1]` of what is decoded, the same for every token: it follows the rows."""
        return self.where and self.where.next_text()

    def decode_embeddings(self, embeds: Tensor) -> Tensor:
        """Run `embeds` `[rows, length, lm_width]`; return the last logits `[rows, vocabulary]`."""
        return last_logits(
            self.vlm,
            embeds,
            self.visual,
            self.where,
            self.position_ids,
            self.attention_mask,
            self.kv_cache,
        )

    def decode_next(self, token_ids: Tensor) -> Tensor:
        """Run one more token per row, `token_ids` `[rows]`; return logits `[rows, vocabulary]`."""
        self.where = self.text_places
        self.position_ids = self.position_ids[:, -1:] + 1
        self.attention_mask = torch.cat(
            [self.attention_mask, self.attention_mask.new_ones(len(token_ids), 1)], dim=1
        )
        return self.decode_embeddings(self.vlm.token_embedding(token_ids[:, None]))


class StaticDecodingState:
    """Rows after prefill that go on with a static KV cache, so that every step has one shape."""

    def __init__(
        self, state: DecodingState, new_token_count: int, decode_step: CompiledDecodeStep | None
    ) -> None:
        """Go on from `state` for `new_token_count` more tokens; its cache is used up.

        `decode_step` holds the compiled graphs, None for none yet.
        """
        rows, prefilled = state.attention_mask.shape
        length = -(-(prefilled + new_token_count) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        self.vlm, self.visual = state.vlm, state.visual
        self.decode_step = decode_step or CompiledDecodeStep()
        self.where = state.text_places
        self.position_ids = state.position_ids[:, -1:].clone()
        self.attention_mask = state.attention_mask.new_zeros(rows, 1, 1, length, dtype=torch.bool)
        """`[rows, 1, 1, length]`: what the next token attends to; transformers uses it as it is."""
        self.attention_mask[:, 0, 0, :prefilled] = state.attention_mask.bool()
        self.kv_cache = to_static_cache(state.kv_cache, state.vlm.language.config, length)
        self.token_ids = self.position_ids.new_zeros(rows)
        self._graph = StepGraph(capture_device(state.vlm))

    def decode_next(self, token_ids: Tensor) -> Tensor:
        """Run one more token per row, `token_ids` `[rows]`; return logits `[rows, vocabulary]`.

        On a GPU the next call overwrites them.
        """
        self.token_ids.copy_(token_ids)
        return self._graph.run(self._run_step)

    def _run_step(self) -> Tensor:
        """Run `token_ids`; all tensors are changed in place, so that a graph finds them again."""
        self.position_ids += 1
        self.attention_mask.index_fill_(3, static_cache_position(self.kv_cache), True)
        return self.decode_step(
            self.vlm,
            self.token_ids,
            self.visual,
            self.where,
            self.position_ids,
            self.attention_mask,
            self.kv_cache,
        )


class CompiledDecodeStep:
    """The decoding step of one token per row, compiled for each new shape.

    A graph takes the weights as its inputs and checks them at every call: what was moved, cast,
    adapted or rebuilt is compiled anew, and nothing keeps the old weights.
    """

    def __init__(self, backend: str = "inductor", any_shape: bool = False) -> None:
        """Compile with a backend of torch.compile, at the first call.

        With `any_shape` numbers of rows and positions are no part of a graph, which is a little
        slower: for rows that come and go, whose answers would wait for each compilation.
        """
        self._backend, self._any_shape = backend, any_shape

    @functools.cached_property
    def _compiled_step(self) -> Callable[..., Tensor]:
        return torch.compile(
            _decode_step, dynamic=self._any_shape, fullgraph=True, backend=self._backend
        )

    def __call__(self, vlm: VLM, *step_inputs: Any) -> Tensor:
        """Call `_decode_step`, compiled; return its logits `[rows, vocabulary]`.

        Where decoder layers have hooks (connectors that inject, FSDP, frozen bf16 weights) nothing
        is compiled: these look at values, or exchange weights, which no graph can hold.
        """
        if has_layer_hooks(vlm):
            return _decode_step(vlm, *step_inputs)
        try:
            with compiler_settings(recompile_limit=MAX_GRAPHS):
                return self._compiled_step(vlm, *step_inputs)
        except Exception as error:
            if not is_compiler_error(error):
                raise
            raise UserError(
                "compiled: the step of the answer could not be compiled "
                f"({one_line(error, max_lines=2)}). {COMPILER_NEEDS}; compiled=False does without"
            ) from error


def capture_device(vlm: VLM) -> torch.device | None:
    """Return the GPU on which compiled steps are recorded, None where there are none."""
    return vlm.device if vlm.device.type == "cuda" and not has_layer_hooks(vlm) else None


def has_layer_hooks(vlm: VLM) -> bool:
    """Tell whether decoder layers have hooks, so that nothing is compiled."""
    modules = (*vlm.language.model.layers, vlm.language.lm_head)
    return any(has_forward_hooks(module) for module in modules)


def last_logits(
    vlm: VLM,
    embeds: Tensor,
    visual: Levels | None,
    where: ImagePlaces | None,
    position_ids: Tensor,
    attention_mask: Tensor,
    kv_cache: DynamicCache | StaticCache | CacheView,
) -> Tensor:
    """Run embeddings that come next; return the last logits `[rows, vocabulary]`.

    Args:
        vlm: The model, in evaluation mode.
        embeds: `[rows, length, lm_width]`.
        visual: Visual tokens `[views, tokens, width]`, or levels of them; read where they are
            injected.
        where: Places `[rows, length]` of the positions; None if nothing is injected.
        position_ids: `[rows, length]`.
        attention_mask: What is attended to, in a form that transformers takes.
        kv_cache: Keys and values, to which those of `embeds` are written.
    """
    hidden = vlm.run_decoder(
        embeds,
        visual,
        where,
        position_ids=position_ids,
        attention_mask=attention_mask,
        use_cache=True,
        **{CACHE_ARGUMENT: kv_cache},
    ).last_hidden_state
    assert hidden is not None
    return vlm.logits(hidden[:, -1])


def _decode_step(vlm: VLM, token_ids: Tensor, *step_inputs: Any) -> Tensor:
    """Run one more token per row, `token_ids` `[rows]`; the rest is that of `last_logits`."""
    return last_logits(vlm, vlm.token_embedding(token_ids[:, None]), *step_inputs)
