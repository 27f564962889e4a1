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

from vlbench.mistakes import Mistake
from vlbench.model.compiled import of_compiler, reason
from vlbench.model.rows import CACHE, Rows

if TYPE_CHECKING:
    from vlbench.model.vlm import VLM

MULTIPLE = 256
"""Lengths are multiples: of Yi-VL's 4096 positions 16 exist, and 255 at most are for nothing."""
GRAPHS = 64
"""So many shapes are compiled at most, of all models of a process; torch allows 8 otherwise."""


class StaticCache:
    """Keys and values of the layers, at their full length from the beginning."""

    def __init__(self, layers: list[Any], length: int) -> None:
        """Copy what the `layers` of a growing cache have read into room for `length` positions.

        They are taken out of the list one by one, so that there are never two caches at once.
        """
        read = layers[0].keys.shape[2]
        self.at = torch.tensor([read], device=layers[0].keys.device)
        """Where the next token goes, on the device: as a number it would be part of the graph."""
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        while layers:
            layer = layers.pop(0)
            self.keys.append(_room(layer.keys, length))
            self.values.append(_room(layer.values, length))

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Put in `key` and `value` `[rows, heads, 1, head width]` of a layer; return all of it.

        The name and the arguments are those of transformers.
        """
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys.index_copy_(2, self.at, key)
        values.index_copy_(2, self.at, value)
        return keys, values


def _room(read: Tensor, length: int) -> Tensor:
    """Return `read` `[rows, heads, positions, head width]` with zeros behind, up to `length`.

    Nobody sees them, but they are multiplied by zero, so they must be numbers.
    """
    rows, heads, count, width = read.shape
    room = read.new_zeros(rows, heads, length, width)
    room[:, :, :count] = read
    return room


class StaticRows:
    """Rows that were read with a growing cache, and go on in one of full length."""

    def __init__(self, rows: Rows, new: int) -> None:
        """Go on where `rows` are, for `new` tokens more; the cache of `rows` is used up."""
        count, read = rows.mask.shape
        length = -(-(read + new) // MULTIPLE) * MULTIPLE
        self.vlm, self.visual = rows.vlm, rows.visual
        self.sees, self.positions = rows.sees[:, -1:].clone(), rows.positions[:, -1:].clone()
        self.mask = rows.mask.new_zeros(count, 1, 1, length, dtype=torch.bool)
        """`[rows, 1, 1, length]`: what the next token sees; transformers takes it as it is."""
        self.mask[:, 0, 0, :read] = rows.mask.bool()
        self.cache = StaticCache(rows.cache.layers, length)

    def follow(self, ids: Tensor) -> Tensor:
        """Read one token more in every row, `ids` `[rows]`; return logits `[rows, vocabulary]`."""
        self.positions += 1
        self.mask.index_fill_(3, self.cache.at, True)
        logits = self.vlm.step(
            self.vlm, ids, self.visual, self.sees, self.positions, self.mask, self.cache
        )
        self.cache.at += 1
        return logits


class Step:
    """The step of a model in which one token more is read, compiled for each new shape.

    A graph takes weights as its inputs and is checked against them at every call: what was moved,
    cast, adapted or connected anew is compiled anew, and nothing keeps the old weights.
    """

    def __init__(self, backend: str = "inductor") -> None:
        """Compile with `backend` of torch; it works at the first call."""
        self._backend = backend

    @functools.cached_property
    def _run(self) -> Callable[..., Tensor]:
        return torch.compile(_step, dynamic=False, fullgraph=True, backend=self._backend)

    def __call__(self, vlm: VLM, *given: Any) -> Tensor:
        """Take what `_step` takes; return its logits `[rows, vocabulary]`.

        Where blocks have hooks (connectors that inject, shards, held weights) nothing is compiled:
        these look at values, or exchange weights, which no graph can hold.
        """
        if _hooked(vlm):
            return _step(vlm, *given)
        from torch import _dynamo  # it takes a second

        try:
            with _dynamo.config.patch(recompile_limit=GRAPHS):
                return self._run(vlm, *given)
        except Exception as error:
            if not of_compiler(error):
                raise
            raise Mistake(
                f"compiled: the step of the answer could not be compiled ({reason(error)}). On a "
                "CPU a C++ compiler is needed; compiled=False does without"
            ) from error


def _hooked(vlm: VLM) -> bool:
    blocks = (*vlm.language.model.layers, vlm.language.lm_head)
    return any(block._forward_pre_hooks or block._forward_hooks for block in blocks)


def _step(
    vlm: VLM,
    ids: Tensor,
    visual: Tensor,
    sees: Tensor,
    positions: Tensor,
    mask: Tensor,
    cache: StaticCache,
) -> Tensor:
    """Read one token more; see `StaticRows` for the shapes. Returns logits `[rows, vocabulary]`."""
    hidden = vlm.read(
        vlm.language.get_input_embeddings()(ids[:, None]),
        visual,
        sees,
        position_ids=positions,
        attention_mask=mask,
        use_cache=True,
        **{CACHE: cache},
    ).last_hidden_state
    return vlm.language.lm_head(hidden[:, -1])
