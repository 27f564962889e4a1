"""The one context of mixed precision: training, its measurements and `plan` all run under it."""

from __future__ import annotations

import torch


def autocast_context(device_type: str, bf16: bool) -> torch.autocast:
    """Return the context in which products are computed in bfloat16; without `bf16` it is off.

    Its cache of weights in bfloat16 is off. A weight is cast where it is used: once in a
    micro-batch, and once more where a block is recomputed. The cache would spare the second cast, 6
    bytes of traffic for a trained weight, at the price of 2 bytes of memory for each of them until
    the micro-batch ends (12.9 GB at 6B), also under `full`, which is there to save memory. Compiled
    blocks never use it, sharded ones would keep whole weights in it, a pass without gradients
    leaves copies in it that have no graph, and gradients of several uses of a weight would be
    summed in bfloat16. What is cast in the forward pass of a block that keeps its activations is
    kept for the backward pass in either case.
    """
    return torch.autocast(device_type, torch.bfloat16, enabled=bf16, cache_enabled=False)
