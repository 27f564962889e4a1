"""Micro-batches that no sample makes: one of weight 0, and a row filled up with text."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vlbench.data.packing import PackedBatch
from vlbench.data.sample_encoding import IGNORE_INDEX


def empty_batch(like: PackedBatch | None = None) -> PackedBatch:
    """Return a micro-batch of weight 0: one token without a label, no image.

    A rank that has fewer micro-batches than the others runs it, so that all ranks run the same
    collectives. `like` gives device and pixel type.
    """
    zero = torch.zeros(1, 1, dtype=torch.long, device=like.input_ids.device if like else None)
    return PackedBatch(
        input_ids=zero,
        labels=torch.full_like(zero, IGNORE_INDEX),
        position_ids=zero,
        sample_index=zero,
        image_index=torch.full_like(zero, -1),
        pixels=like.pixels[:0] if like else torch.zeros(0, 3, 0, 0),
        sample_ids=["(empty)"],
        sample_lengths=[[1]],
        supervised_token_count=0,
    )


def extend_row(batch: PackedBatch, length: int) -> PackedBatch:
    """Return a micro-batch of one row, on the CPU, with text up to `length` positions.

    The text is one more sample, all of it supervised. A longer row is returned unchanged.
    """
    added = length - batch.input_ids.shape[1]
    if added <= 0 or batch.labels is None:
        return batch

    def append(values: Tensor, more: Tensor | int) -> Tensor:
        return torch.cat([values, torch.zeros(1, added, dtype=torch.long) + more], dim=1)

    extended = replace(
        batch,
        input_ids=append(batch.input_ids, 0),
        labels=append(batch.labels, 0),
        position_ids=append(batch.position_ids, torch.arange(added)),
        sample_index=append(batch.sample_index, len(batch.sample_ids)),
        image_index=append(batch.image_index, -1),
        sample_ids=[*batch.sample_ids, "(text)"],
        sample_lengths=[[*batch.sample_lengths[0], added]],
        supervised_token_count=batch.supervised_token_count + added,
        captions=[*batch.captions, ""],
        stream_index=[],
        supervised_positions=None,
        image_positions=None,
    )
    return extended.locate_positions()
