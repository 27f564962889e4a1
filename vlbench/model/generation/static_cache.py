"""Answers written at one size: a step with fixed shapes, which is compiled once for many batches.

Prompts are read as always. What was read of them is then copied into keys and values of the full
length, rounded up so that few shapes exist, and every step reads one token with the same graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlbench.compat.torch_internals import (
    compiler_settings,
    has_forward_hooks,
    is_compiler_error,
)
from vlbench.compat.transformers_internals import kv_cache_layers
from vlbench.errors import UserError
from vlbench.model.compile_blocks import describe_compiler_error
from vlbench.model.generation.decoding_state import CACHE_ARGUMENT, DecodingState

if TYPE_CHECKING:
    from vlbench.model.vlm import VLM

LENGTH_MULTIPLE = 256
"""Lengths are multiples: of Yi-VL's 4096 positions 16 exist, and 255 at most are for nothing."""
MAX_GRAPHS = 64
"""So many shapes are compiled at most, of all models of a process; torch allows 8 otherwise."""


class StaticKVCache:
    """Keys and values of the layers, at their full length from the beginning."""

    def __init__(self, layers: list[Any], max_length: int) -> None:
        """Copy what the `layers` of a growing cache have read into room for `length` positions.

        They are taken out of the list one by one, so that there are never two caches at once.
        """
        read = layers[0].keys.shape[2]
        self.next_position = torch.tensor([read], device=layers[0].keys.device)
        """Where the next token goes, on the device: as a number it would be part of the graph."""
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        while layers:
            layer = layers.pop(0)
            self.keys.append(_pad_to_length(layer.keys, max_length))
            self.values.append(_pad_to_length(layer.values, max_length))

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Put in `key` and `value` `[rows, heads, 1, head width]` of a layer; return all of it.

        The name and the arguments are those of transformers.
        """
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys.index_copy_(2, self.next_position, key)
        values.index_copy_(2, self.next_position, value)
        return keys, values


def _pad_to_length(cached: Tensor, max_length: int) -> Tensor:
    """Return `read` `[rows, heads, positions, head width]` with zeros behind, up to `length`.

    Nobody sees them, but they are multiplied by zero, so they must be numbers.
    """
    rows, heads, count, width = cached.shape
    room = cached.new_zeros(rows, heads, max_length, width)
    room[:, :, :count] = cached
    return room


class StaticDecodingState:
    """Rows that were read with a growing cache, and go on in one of full length."""

    def __init__(self, state: DecodingState, new_tokens: int) -> None:
        """Go on where `rows` are, for `new` tokens more; the cache of `rows` is used up."""
        count, read = state.attention_mask.shape
        length = -(-(read + new_tokens) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        self.vlm, self.visual = state.vlm, state.visual
        self.image_index, self.position_ids = (
            state.image_index[:, -1:].clone(),
            state.position_ids[:, -1:].clone(),
        )
        self.attention_mask = state.attention_mask.new_zeros(count, 1, 1, length, dtype=torch.bool)
        """`[rows, 1, 1, length]`: what the next token sees; transformers takes it as it is."""
        self.attention_mask[:, 0, 0, :read] = state.attention_mask.bool()
        self.kv_cache = StaticKVCache(kv_cache_layers(state.kv_cache), length)

    def decode_next(self, token_ids: Tensor) -> Tensor:
        """Read one token more in every row, `ids` `[rows]`; return logits `[rows, vocabulary]`."""
        self.position_ids += 1
        self.attention_mask.index_fill_(3, self.kv_cache.next_position, True)
        logits = self.vlm.decode_step(
            self.vlm,
            token_ids,
            self.visual,
            self.image_index,
            self.position_ids,
            self.attention_mask,
            self.kv_cache,
        )
        self.kv_cache.next_position += 1
        return logits


class CompiledDecodeStep:
    """The step of a model in which one token more is read, compiled for each new shape.

    A graph takes weights as its inputs and is checked against them at every call: what was moved,
    cast, adapted or connected anew is compiled anew, and nothing keeps the old weights.
    """

    def __init__(self, backend: str = "inductor") -> None:
        """Compile with `backend` of torch; it works at the first call."""
        self._backend = backend

    @functools.cached_property
    def _compiled_step(self) -> Callable[..., Tensor]:
        return torch.compile(_decode_step, dynamic=False, fullgraph=True, backend=self._backend)

    def __call__(self, vlm: VLM, *step_inputs: Any) -> Tensor:
        """Take what `_step` takes; return its logits `[rows, vocabulary]`.

        Where blocks have hooks (connectors that inject, shards, held weights) nothing is compiled:
        these look at values, or exchange weights, which no graph can hold.
        """
        if _has_block_hooks(vlm):
            return _decode_step(vlm, *step_inputs)
        try:
            with compiler_settings(recompile_limit=MAX_GRAPHS):
                return self._compiled_step(vlm, *step_inputs)
        except Exception as error:
            if not is_compiler_error(error):
                raise
            raise UserError(
                "compiled: the step of the answer could not be compiled "
                f"({describe_compiler_error(error)}). On a "
                "CPU a C++ compiler is needed; compiled=False does without"
            ) from error


def _has_block_hooks(vlm: VLM) -> bool:
    blocks = (*vlm.language.model.layers, vlm.language.lm_head)
    return any(has_forward_hooks(block) for block in blocks)


def _decode_step(
    vlm: VLM,
    token_ids: Tensor,
    visual: Tensor,
    image_index: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor,
    kv_cache: StaticKVCache,
) -> Tensor:
    """Read one token more; see `StaticRows` for the shapes. Returns logits `[rows, vocabulary]`."""
    hidden = vlm.run_decoder(
        vlm.language.get_input_embeddings()(token_ids[:, None]),
        visual,
        image_index,
        position_ids=position_ids,
        attention_mask=attention_mask,
        use_cache=True,
        **{CACHE_ARGUMENT: kv_cache},
    ).last_hidden_state
    return vlm.language.lm_head(hidden[:, -1])
