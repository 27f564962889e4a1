"""Contrastive objectives: each pair is compared with those of the whole global batch.

Every micro-batch of a step runs twice, as open_clip accumulates (`--accum-freq`): first without a
graph, for what pairs are compared by (`Connector.embed`); then with one, against that of all
micro-batches and processes (`Batch.pool`). So a step is the same however its samples are packed and
shared out, and takes the memory of one micro-batch's graph.

Until the step is done, a process keeps the rows of `embed` for all pairs and, of its own pairs, the
features that a frozen tower gave: the tower runs once. For 1,680 pairs behind ViT-H at 224 pixels
features take 2.2 GB in float32: all of it on one process, a share on each of several. The pictures
of negatives travel for one micro-batch at a time. Of a tower that is trained nothing is kept:
pixels travel, and it sees the pictures of negatives beside its own, with a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlbench.connector.base import Connector
from vlbench.data.packing import ContrastPool, PackedBatch
from vlbench.distributed import collectives

if TYPE_CHECKING:
    from vlbench.model.vlm import VLM

PairEmbeddings = dict[str, Tensor]


def is_contrastive(vlm: VLM) -> bool:
    """Tell whether the objective of `vlm` compares pairs with each other."""
    return (
        vlm.objective != "language"
        and type(vlm.connector).contrast_embeddings is not Connector.contrast_embeddings
    )


def add_contrast_pools(
    vlm: VLM, batches: Sequence[PackedBatch], all_processes: bool = True
) -> list[PackedBatch]:
    """Return the micro-batches of a step, each with the pool of all of them.

    All processes must have as many. Unless `shared`, no other process is asked, and the pairs of
    `batches` are all there are.
    """
    if not is_contrastive(vlm):
        return list(batches)
    seen: list[PackedBatch] = []
    found: list[PairEmbeddings] = []
    for batch in batches:
        with torch.no_grad():
            out = vlm(batch.to(vlm.device), embed_pairs=True)
        found.append(out.contrast_embeddings)
        seen.append(_replace_pixels(vlm, batch, out.features))
    torch.clear_autocast_cache()  # its copies of weights were made without a graph
    return _attach_pools(vlm, seen, found, all_processes)


def add_own_contrast_pool(vlm: VLM, batch: PackedBatch, features: Tensor) -> PackedBatch:
    """Return a micro-batch that is a step of its own, with its pool over all processes.

    `features` are those of its pictures. For use inside of `vlm.forward`.
    """
    with torch.no_grad():
        found = vlm.connector.contrast_embeddings(vlm.objective, features.detach(), batch)
    torch.clear_autocast_cache()
    return _attach_pools(vlm, [_replace_pixels(vlm, batch, features)], [found], True)[0]


def _replace_pixels(vlm: VLM, batch: PackedBatch, features: Tensor) -> PackedBatch:
    """Return a batch with its features in the place of its pixels, if the tower learns nothing."""
    if torch.is_grad_enabled() and vlm.is_vision_trained():
        return batch
    nothing = batch.pixels.new_zeros(len(batch.pixels), 3, 0, 0)
    return replace(batch, features=features, pixels=nothing)


def _attach_pools(
    vlm: VLM, batches: list[PackedBatch], pair_embeddings: list[PairEmbeddings], all_processes: bool
) -> list[PackedBatch]:
    """Put all pairs into one order, that of their keys; `found` is what each micro-batch gave."""
    if not pair_embeddings[0]:
        return batches
    keys = [
        batch.sample_keys()[: _count_pairs(rows)]
        for batch, rows in zip(batches, pair_embeddings, strict=True)
    ]
    mine = [key for some in keys for key in some]
    everyone = collectives.all_gather_objects(mine) if all_processes else [mine]
    names = [key for theirs in everyone for key in theirs]
    order = torch.tensor(sorted(range(len(names)), key=names.__getitem__), dtype=torch.long)
    rows = {}
    for name, one in pair_embeddings[0].items():
        whole = torch.cat([rows[name] for rows in pair_embeddings])
        rows[name] = (collectives.all_gather_rows(whole)[0] if all_processes else whole)[
            order.to(one.device)
        ]
    pictures = _PairFeatures(vlm, batches, pair_embeddings, order, all_processes)
    place = order.argsort()
    start = sum(len(theirs) for theirs in everyone[: collectives.rank()]) if all_processes else 0
    made = []
    for batch, own in zip(batches, keys, strict=True):
        where = place[start : start + len(own)].to(vlm.device)
        made.append(replace(batch, contrast_pool=ContrastPool(rows, where, own, pictures)))
        start += len(own)
    return made


def _count_pairs(embeddings: PairEmbeddings) -> int:
    return len(next(iter(embeddings.values())))


class _PairFeatures:
    """The features of any pairs' pictures, wherever these are."""

    def __init__(
        self,
        vlm: VLM,
        batches: list[PackedBatch],
        pair_embeddings: list[PairEmbeddings],
        pair_order: Tensor,
        all_processes: bool,
    ) -> None:
        self._vlm, self._first_batch, self._pair_order, self._all_processes = (
            vlm,
            batches[0],
            pair_order,
            all_processes,
        )
        self._image_inputs: list[Tensor] = []
        for batch, rows in zip(batches, pair_embeddings, strict=True):
            known = batch.pixels if batch.features is None else batch.features
            self._image_inputs += known[: _count_pairs(rows)]
        if self._first_batch.features is None:
            side = vlm.vision.image_size
            self._empty_input = torch.zeros(0, 3, side, side, dtype=self._first_batch.pixels.dtype)
            self._empty_input = self._empty_input.to(vlm.device)
        else:
            self._empty_input = self._first_batch.features[:0].detach()

    def __call__(self, pair_numbers: Tensor) -> Tensor:
        """Return `[which, patches, vision_width]` for numbers of pairs in the pool."""
        numbers = self._pair_order[pair_numbers.cpu()].tolist()
        fetch = collectives.fetch_rows if self._all_processes else collectives.select_rows
        rows = fetch(self._image_inputs, numbers, self._empty_input)
        if self._first_batch.features is not None:
            return rows
        return self._vlm.features(replace(self._first_batch, pixels=rows))[: len(rows)]
