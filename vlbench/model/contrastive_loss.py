"""Contrastive objectives: each image-caption pair is compared with those of the global batch.

Every micro-batch of a step runs twice, as open_clip accumulates (`--accum-freq`): first without a
graph, for the embeddings that pairs are compared by (`Connector.contrast_embeddings`); then with a
graph, against the embeddings of all micro-batches and processes (`PackedBatch.contrast_pool`). So a
step is the same however its samples are packed and distributed, and takes the memory of one
micro-batch's graph.

Until the step is done, a process keeps the embeddings of all pairs and, of its own pairs, the
features of a frozen vision encoder, which runs once. For 1,680 pairs behind ViT-H at 224 pixels the
features take 2.2 GB in float32: all of it on one process, a share on each of several. Images of
negatives are exchanged for one micro-batch at a time. Of a vision encoder that is trained nothing
is kept: pixels are exchanged, and it encodes the images of negatives beside its own, with a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from vlbench.connector.base import Connector
from vlbench.connector.levels import Levels, map_levels, stack_levels, unstack_levels
from vlbench.data.packing import ContrastPool, PackedBatch
from vlbench.distributed import collectives

PairEmbeddings = dict[str, Tensor]


class ContrastEncoder(Protocol):
    """What contrastive objectives need of a model; `model.vlm.VLM` is one."""

    @property
    def connector(self) -> Connector: ...

    @property
    def vision(self) -> Any: ...

    @property
    def objective(self) -> str: ...

    @property
    def device(self) -> torch.device: ...

    def is_vision_trained(self) -> bool: ...

    def extract_features(self, batch: PackedBatch) -> Levels: ...

    def __call__(self, batch: PackedBatch, embed_pairs: bool) -> Any: ...


def is_contrastive(model: ContrastEncoder) -> bool:
    """Tell whether the objective of a model compares pairs with each other."""
    return (
        model.objective != "language"
        and type(model.connector).contrast_embeddings is not Connector.contrast_embeddings
    )


def add_contrast_pools(
    model: ContrastEncoder, batches: Sequence[PackedBatch], all_processes: bool = True
) -> list[PackedBatch]:
    """Return the micro-batches of a step, each with the contrast pool of all of them.

    All processes must have the same number. Unless `all_processes`, nothing is exchanged, and the
    pool is the pairs of `batches`.
    """
    if not is_contrastive(model):
        return list(batches)
    encoded: list[PackedBatch] = []
    embeddings: list[PairEmbeddings] = []
    for batch in batches:
        with torch.no_grad():
            output = model(batch.to(model.device), embed_pairs=True)
        embeddings.append(output.contrast_embeddings)
        encoded.append(_replace_pixels(model, batch, output.features))
    torch.clear_autocast_cache()  # its copies of weights were made without a graph
    return _attach_pools(model, encoded, embeddings, all_processes)


def add_own_contrast_pool(
    model: ContrastEncoder, batch: PackedBatch, features: Levels
) -> PackedBatch:
    """Return a micro-batch that is a step of its own, with its pool over all processes.

    `features` are those of its images. For use inside of the model's forward.
    """
    with torch.no_grad():
        embeddings = model.connector.contrast_embeddings(
            model.objective, map_levels(Tensor.detach, features), batch
        )
    torch.clear_autocast_cache()
    return _attach_pools(model, [_replace_pixels(model, batch, features)], [embeddings], True)[0]


def _replace_pixels(model: ContrastEncoder, batch: PackedBatch, features: Levels) -> PackedBatch:
    """Return a batch with features instead of pixels, unless the vision encoder is trained."""
    if torch.is_grad_enabled() and model.is_vision_trained():
        return batch
    no_pixels = batch.pixels.new_zeros(len(batch.pixels), 3, 0, 0)
    return replace(batch, features=stack_levels(features), pixels=no_pixels)


def _attach_pools(
    model: ContrastEncoder,
    batches: list[PackedBatch],
    pair_embeddings: list[PairEmbeddings],
    all_processes: bool,
) -> list[PackedBatch]:
    """Return the batches with one pool of all pairs, in the order of their keys.

    `pair_embeddings` holds the embeddings of each micro-batch's pairs.
    """
    if not pair_embeddings[0]:
        return batches
    batch_keys = [
        batch.sample_keys()[: _count_pairs(rows)]
        for batch, rows in zip(batches, pair_embeddings, strict=True)
    ]
    own_keys = [key for keys in batch_keys for key in keys]
    process_keys = collectives.all_gather_objects(own_keys) if all_processes else [own_keys]
    all_keys = [key for keys in process_keys for key in keys]
    order = torch.tensor(sorted(range(len(all_keys)), key=all_keys.__getitem__), dtype=torch.long)
    pool_embeddings = {}
    for name, first_rows in pair_embeddings[0].items():
        own_rows = torch.cat([rows[name] for rows in pair_embeddings])
        all_rows = collectives.all_gather_rows(own_rows)[0] if all_processes else own_rows
        pool_embeddings[name] = all_rows[order.to(first_rows.device)]
    pair_features = _PairFeatures(model, batches, pair_embeddings, order, all_processes)
    sorted_index = order.argsort()
    start = sum(len(keys) for keys in process_keys[: collectives.rank()]) if all_processes else 0
    pooled = []
    for batch, keys in zip(batches, batch_keys, strict=True):
        local_indices = sorted_index[start : start + len(keys)].to(model.device)
        pool = ContrastPool(pool_embeddings, local_indices, keys, pair_features)
        pooled.append(replace(batch, contrast_pool=pool))
        start += len(keys)
    return pooled


def _count_pairs(embeddings: PairEmbeddings) -> int:
    return len(next(iter(embeddings.values())))


class _PairFeatures:
    """The image features of any pairs of the pool, on whichever process their images are."""

    def __init__(
        self,
        model: ContrastEncoder,
        batches: list[PackedBatch],
        pair_embeddings: list[PairEmbeddings],
        pair_order: Tensor,
        all_processes: bool,
    ) -> None:
        self._model, self._first_batch = model, batches[0]
        self._pair_order, self._all_processes = pair_order, all_processes
        self._image_inputs: list[Tensor] = []
        for batch, rows in zip(batches, pair_embeddings, strict=True):
            features = batch.features
            image_inputs = batch.normalized_pixels() if features is None else features
            self._image_inputs += image_inputs[: _count_pairs(rows)]
        if self._first_batch.features is None:
            pixels = self._first_batch.normalized_pixels()
            self._empty_input = torch.zeros(0, *model.vision.pixel_shape, dtype=pixels.dtype)
            self._empty_input = self._empty_input.to(model.device)
        else:
            self._empty_input = self._first_batch.features[:0].detach()

    def __call__(self, pair_numbers: Tensor) -> Levels:
        """Return features `[pairs, patches, vision_width]` for the numbers of pairs in the pool."""
        numbers = self._pair_order[pair_numbers.cpu()].tolist()
        fetch = collectives.fetch_rows if self._all_processes else collectives.select_rows
        rows = fetch(self._image_inputs, numbers, self._empty_input)
        if self._first_batch.features is not None:
            return unstack_levels(rows)
        features = self._model.extract_features(replace(self._first_batch, pixels=rows))
        return map_levels(lambda level: level[: len(rows)], features)
