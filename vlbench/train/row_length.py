"""`max_tokens_per_row=auto`: the longest packed row that a GPU has memory for.

Every micro-batch sums gradients and casts weights once, whatever its length: for 6 billion weights
about 50 ms on an H200, as much as 600 tokens take. So large cards get longer rows. A row must not
cost more than it saves, however: where activation checkpointing is chosen, too, rows are as long as
`selective` recomputation, which is nearly free, has memory for; only if it fits at no length do
they become as long as `full` recomputation allows. The mode itself is measured afterwards, on rows
of the length chosen here.

The choice is an estimate by formula, from shapes alone, so `plan` makes the same one for a card
that is not here. The packing of a stage depends on it: it is recorded in the run, and a run that
goes on keeps it on any card.
"""

from __future__ import annotations

import torch

from vlbench.compat.vision_internals import encoder_width
from vlbench.model.vlm import VLM
from vlbench.train.auto_checkpointing import OPTIMIZER_BYTES_PER_PARAM, SPARE_MEMORY_SHARE

DEFAULT_ROW_TOKENS = 4096  # without a GPU, or where longer rows do not fit
LONGER_ROWS = (16384, 8192)
ACTIVATION_BYTES = {"none": 62, "selective": 24, "full": 5}
"""What a block keeps of a position for the backward pass, in bytes per channel of its width, with
16-bit products: of Yi-6B's shapes, by `plan`. `full` includes the one block that runs again."""
SPARE_ROW_SHARE = 0.2  # of what rows may take: samples differ, and the formula is not exact


def gpu_memory_limit(device: torch.device) -> int | None:
    """Return the bytes of a GPU that training may use, None for another device."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory * (1 - SPARE_MEMORY_SHARE))


def choose_row_tokens(
    vlm: VLM, memory_limit: float | None, checkpointing_mode: str, *, bf16: bool, shards: int = 1
) -> int:
    """Return the tokens of a packed row for a model that is prepared for its stage.

    Args:
        vlm: The model; its weights may be on `meta`.
        memory_limit: Bytes of a device that may be used, None where there is no GPU.
        checkpointing_mode: The recipe's activation checkpointing.
        bf16: Whether matrix products are in 16 bits.
        shards: Over how many devices a copy of the model is sharded (`trainer.shard_count`).
    """
    if memory_limit is None:
        return DEFAULT_ROW_TOKENS
    spare_bytes = memory_limit - model_bytes(vlm, bf16) / shards
    token_bytes = {mode: bytes_per_token(vlm, mode, bf16) for mode in ACTIVATION_BYTES}
    return longest_fitting_row(spare_bytes * (1 - SPARE_ROW_SHARE), token_bytes, checkpointing_mode)


def longest_fitting_row(
    spare_bytes: float, token_bytes: dict[str, float], checkpointing_mode: str
) -> int:
    """Return the longest row that takes at most `spare_bytes`, DEFAULT_ROW_TOKENS if none does.

    `token_bytes` has the bytes that a token takes in each checkpointing mode.
    """
    modes = ("selective", "full") if checkpointing_mode == "auto" else (checkpointing_mode,)
    for mode in modes:
        for row_tokens in (*LONGER_ROWS, DEFAULT_ROW_TOKENS):
            if row_tokens * token_bytes[mode] <= spare_bytes:
                return row_tokens
    return DEFAULT_ROW_TOKENS


def model_bytes(vlm: VLM, bf16: bool) -> float:
    """Return the bytes of weights, gradients, optimizer, and 16-bit copies of trained weights."""
    total = 0.0
    for parameter in vlm.parameters():
        if parameter.requires_grad:
            copy_bytes = 2 if bf16 else 0
            total += parameter.numel() * (4 + 4 + OPTIMIZER_BYTES_PER_PARAM + copy_bytes)
        else:
            total += parameter.numel() * (2 if bf16 else 4)
    return total


def bytes_per_token(vlm: VLM, checkpointing_mode: str, bf16: bool) -> float:
    """Return the bytes of activations that a position of a packed row keeps.

    A vision encoder that is trained keeps those of the patches behind a position as well: rows are
    taken to be full of images.
    """
    language = vlm.language.config
    channels = float(language.num_hidden_layers * language.hidden_size)
    if vlm.is_vision_trained():
        patches_per_position = vlm.shapes.patches / vlm.connector.tokens_per_image
        for encoder in vlm.vision.encoders():
            width = encoder_width(encoder.visual)
            channels += patches_per_position * len(encoder.blocks()) * width
    return channels * ACTIVATION_BYTES[checkpointing_mode] * (1 if bf16 else 2)
