"""Bytes of one GPU by component, for a strategy, a way of recomputing and a row."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from vlbench.model.shard import units
from vlbench.model.vlm import VLM
from vlbench.plan.depth import Rehearsals
from vlbench.plan.ledger import COPIES, LOGITS
from vlbench.plan.outline import Sample, row_of
from vlbench.plan.rehearsal import BACKWARD
from vlbench.train.checkpointing import STATES

Memory = dict[str, float]
"""Bytes of one rank at the peak of a step, by component."""
COMPONENTS = (
    *("weights", "gradients", "optimizer", "exchange"),
    *(COPIES, "activations", LOGITS, BACKWARD),
)
TRIES = 4  # until the largest row is known well enough
PICTURES = 256  # in a row, beyond which it is not tried
CARE = 0.1  # share by which a line through short rows may be wrong about long ones
STEP = 256  # row_tokens are proposed in multiples of it
MOST = 1 << 17  # row_tokens beyond which nobody asks


@dataclass
class StageMemory:
    """A stage whose memory can be asked for."""

    vlm: VLM
    """On `meta`, made ready for the stage."""
    rehearsals: Rehearsals
    sample: Sample
    width: int
    """Bytes of a number in products."""
    world: int
    """Ranks that share the model."""
    known: dict[tuple[int, str], dict[str, float]] = field(default_factory=dict)

    def memory(self, strategy: str, way: str, row_tokens: int) -> Memory:
        """Return the bytes of a rank when its rows are full."""
        asked = (row_tokens, way)
        if asked not in self.known:
            places = self.vlm.connector.tokens_per_image
            self.known[asked] = self.rehearsals.take(row_of(self.sample, row_tokens, places), way)
        step = self.known[asked]
        if strategy == "fsdp2" and self.world > 1:  # weights are gathered in the type of products
            step = {kind: size for kind, size in step.items() if kind != COPIES}
        found = lasting(self.vlm, strategy, self.world, self.width) | step
        return {kind: found.get(kind, 0) for kind in COMPONENTS}

    def largest(self, strategy: str, way: str, near: int, room: float) -> int:
        """Return the most row_tokens with which a step needs at most `room` bytes; 0 if none.

        Memory grows with the row almost as a line: what the line through `near` and twice `near`
        says is tried. Rows of very many pictures take minutes, so there it is believed, less CARE.
        """
        if total(lasting(self.vlm, strategy, self.world, self.width)) > room:
            return 0
        least = math.ceil(self.sample.length)
        low = max(least, near)
        high = 2 * low
        sizes = [total(self.memory(strategy, way, row)) for row in (low, high)]
        slope = max((sizes[1] - sizes[0]) / (high - low), 1.0)
        row, needed = (high, sizes[1]) if sizes[1] <= room else (low, sizes[0])
        for _ in range(TRIES):
            row = min(MOST, int((row + (room - needed) / slope) // STEP) * STEP)
            if row < least:
                break
            if row > high and row * self.sample.images / self.sample.length > PICTURES:
                return max(high, int(row * (1 - CARE)))
            needed = total(self.memory(strategy, way, row))
            if needed <= room:
                return row
        return least if total(self.memory(strategy, way, least)) <= room else 0


def total(memory: Memory) -> float:
    """Return the bytes of all components."""
    return sum(memory.values())


def lasting(vlm: VLM, strategy: str, world: int, width: int) -> Memory:
    """Return what is there all the time: weights, gradients, moments, what is exchanged.

    Under `ddp` gradients lie in the buckets that are exchanged. Under `fsdp2` all but `exchange` is
    divided among ranks; that is what is gathered (`model.shard`): the weights of no unit, in
    float32, and of two units, one of them on its way, in `width` bytes if they are blocks of tower
    and language model, and their gradients, which are added up in float32.
    """
    trained = [one for one in vlm.parameters() if one.requires_grad]
    weights = _bytes(vlm.parameters()) + _bytes(vlm.buffers())
    gradients, optimizer = _bytes(trained), STATES * sum(one.numel() for one in trained)
    share = world if strategy == "fsdp2" else 1
    exchange = 0.0
    if world > 1:
        exchange = _gathered(vlm, width) if strategy == "fsdp2" else 0.0
    return {
        "weights": weights / share,
        "gradients": gradients / share,
        "optimizer": optimizer / share,
        "exchange": exchange,
    }


def _gathered(vlm: VLM, width: int) -> float:
    found = [list(unit.parameters()) for unit in units(vlm)]
    inside = {id(one) for unit in found for one in unit}
    root = [one for one in vlm.parameters() if id(one) not in inside]
    own = {id(one) for one in vlm.connector.parameters()}
    sizes = (_needed(unit, 4 if id(unit[0]) in own else width) for unit in found)
    return _needed(root, 4) + sum(sorted(sizes, reverse=True)[:2])


def _needed(parameters: list[nn.Parameter], width: int) -> float:
    return sum(one.numel() * (width + 4 * one.requires_grad) for one in parameters)


def _bytes(tensors: Iterable) -> float:
    return float(sum(one.numel() * one.element_size() for one in tensors))
