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

from vlbench import ranks
from vlbench.connector import Connector
from vlbench.data.batch import Batch, Pool

if TYPE_CHECKING:
    from vlbench.model.vlm import VLM

Rows = dict[str, Tensor]


def compares(vlm: VLM) -> bool:
    """Tell whether the objective of `vlm` compares pairs with each other."""
    return vlm.objective != "language" and type(vlm.connector).embed is not Connector.embed


def pooled(vlm: VLM, batches: Sequence[Batch], shared: bool = True) -> list[Batch]:
    """Return the micro-batches of a step, each with the pool of all of them.

    All processes must have as many. Unless `shared`, no other process is asked, and the pairs of
    `batches` are all there are.
    """
    if not compares(vlm):
        return list(batches)
    seen: list[Batch] = []
    found: list[Rows] = []
    for batch in batches:
        with torch.no_grad():
            out = vlm(batch.to(vlm.device), embed=True)
        found.append(out.embedded)
        seen.append(_keep(vlm, batch, out.features))
    torch.clear_autocast_cache()  # its copies of weights were made without a graph
    return _with_pools(vlm, seen, found, shared)


def alone(vlm: VLM, batch: Batch, features: Tensor) -> Batch:
    """Return a micro-batch that is a step of its own, with its pool over all processes.

    `features` are those of its pictures. For use inside of `vlm.forward`.
    """
    with torch.no_grad():
        found = vlm.connector.embed(vlm.objective, features.detach(), batch)
    torch.clear_autocast_cache()
    return _with_pools(vlm, [_keep(vlm, batch, features)], [found], True)[0]


def _keep(vlm: VLM, batch: Batch, features: Tensor) -> Batch:
    """Return a batch with its features in the place of its pixels, if the tower learns nothing."""
    if torch.is_grad_enabled() and vlm.vision_trains():
        return batch
    nothing = batch.pixels.new_zeros(len(batch.pixels), 3, 0, 0)
    return replace(batch, features=features, pixels=nothing)


def _with_pools(vlm: VLM, batches: list[Batch], found: list[Rows], shared: bool) -> list[Batch]:
    """Put all pairs into one order, that of their keys; `found` is what each micro-batch gave."""
    if not found[0]:
        return batches
    keys = [batch.keys()[: _size(rows)] for batch, rows in zip(batches, found, strict=True)]
    mine = [key for some in keys for key in some]
    everyone = ranks.everyone(mine) if shared else [mine]
    names = [key for theirs in everyone for key in theirs]
    order = torch.tensor(sorted(range(len(names)), key=names.__getitem__), dtype=torch.long)
    rows = {}
    for name, one in found[0].items():
        whole = torch.cat([rows[name] for rows in found])
        rows[name] = (ranks.gather(whole)[0] if shared else whole)[order.to(one.device)]
    pictures = _Pictures(vlm, batches, found, order, shared)
    place = order.argsort()
    start = sum(len(theirs) for theirs in everyone[: ranks.rank()]) if shared else 0
    made = []
    for batch, own in zip(batches, keys, strict=True):
        where = place[start : start + len(own)].to(vlm.device)
        made.append(replace(batch, pool=Pool(rows, where, own, pictures)))
        start += len(own)
    return made


def _size(rows: Rows) -> int:
    return len(next(iter(rows.values())))


class _Pictures:
    """The features of any pairs' pictures, wherever these are."""

    def __init__(
        self, vlm: VLM, batches: list[Batch], found: list[Rows], order: Tensor, shared: bool
    ) -> None:
        self._vlm, self._batch, self._order, self._shared = vlm, batches[0], order, shared
        self._rows: list[Tensor] = []
        for batch, rows in zip(batches, found, strict=True):
            known = batch.pixels if batch.features is None else batch.features
            self._rows += known[: _size(rows)]
        if self._batch.features is None:
            side = vlm.vision.image_size
            self._none = torch.zeros(0, 3, side, side, dtype=self._batch.pixels.dtype)
            self._none = self._none.to(vlm.device)
        else:
            self._none = self._batch.features[:0].detach()

    def __call__(self, which: Tensor) -> Tensor:
        """Return `[which, patches, vision_width]` for numbers of pairs in the pool."""
        numbers = self._order[which.cpu()].tolist()
        fetch = ranks.fetch if self._shared else ranks.pick
        rows = fetch(self._rows, numbers, self._none)
        if self._batch.features is not None:
            return rows
        return self._vlm.features(replace(self._batch, pixels=rows))[: len(rows)]
