"""The forward passes of a frozen vision encoder whose features are cached, and their shards."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vlbench.compat.lightning_internals import autocast_context
from vlbench.connector.levels import stack_levels
from vlbench.data.feature_store import FeatureLocations, FeatureShards
from vlbench.data.image_processing import ImageTransform
from vlbench.data.image_tiling import Grid
from vlbench.data.native_aspect import NativeImage
from vlbench.data.packing import normalize_levels
from vlbench.data.sample import LazyImage
from vlbench.distributed.collectives import is_rank_zero
from vlbench.distributed.launcher import isolate_data_worker
from vlbench.errors import UserError
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.train import run_report

VIEWS_PER_CHUNK = 32  # views of images in a forward pass of the encoder
SHARD_BYTES = 2**28  # of features in a shard, the most that an interruption loses
ImagesByKeys = Mapping[tuple[bytes, ...], LazyImage]
"""Images by the keys of their views."""
_KeyedPixels = list[tuple[bytes, Tensor, Grid | None]]
"""The views of an image: their keys, their uint8 pixels `[3, height, width]`, and rows and columns
of patches where the image keeps its aspect ratio."""


def compute_features(
    vlm: LoadedVLM,
    missing: ImagesByKeys,
    shards: FeatureShards,
    trainer: pl.Trainer,
    num_workers: int,
    should_stop: Callable[[], bool],
) -> FeatureLocations:
    """Compute the features of images, write them shard by shard, and return where they are.

    Images that cannot be read are left out.

    Args:
        vlm: The model whose vision encoder is frozen, on the Trainer's device.
        missing: The images, by the keys of their views.
        shards: Where the features are written.
        trainer: Its precision is used.
        num_workers: Processes that load images; 0 for this one.
        should_stop: Asked after every forward pass; the rest is left out when it is true.

    """
    if not missing:
        return {}
    loader: DataLoader[_KeyedPixels] = DataLoader(
        _PixelDataset(vlm.processor.transform, list(missing.items())),
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=isolate_data_worker,
    )
    with torch.no_grad(), autocast_context(trainer):
        return _encode_and_write(vlm, loader, sum(map(len, missing)), shards, should_stop)


def check_disk_space(
    vlm: LoadedVLM, view_count: int, shards: FeatureShards, trainer: pl.Trainer
) -> None:
    """Print the bytes that the features of views will take; refuse them if it is too much."""
    blank = torch.zeros(1, *vlm.vision.pixel_shape, dtype=torch.uint8)
    with torch.no_grad(), autocast_context(trainer):
        of_view = encode_levels(vlm, blank, vlm.processor.transform.level_values()).nbytes
    needed, free = view_count * of_view, shutil.disk_usage(shards.folder).free
    what = f"{view_count:,} {'views of images' if vlm.processor.view_settings else 'images'}"
    run_report.print_status(
        f"features of {what} take {run_report.format_bytes(needed)} in {shards.folder}, "
        f"{run_report.format_bytes(free)} are free"
    )
    if needed > free:
        raise UserError(
            f"trainer.feature_cache: the features of {what} take "
            f"{run_report.format_bytes(needed)}, and {shards.folder} has "
            f"{run_report.format_bytes(free)} left. Make room, "
            "name another folder, or leave it out"
        )


@dataclass
class _PixelDataset(Dataset[_KeyedPixels]):
    """The views of images; none of one that cannot be read."""

    transform: ImageTransform
    keyed_images: list[tuple[tuple[bytes, ...], LazyImage]]

    def __len__(self) -> int:
        return len(self.keyed_images)

    def __getitem__(self, index: int) -> _KeyedPixels:
        keys, image = self.keyed_images[index]
        try:
            pixels = self.transform.load_levels(image)
        except UserError:
            return []
        grid = image.grid if isinstance(image, NativeImage) else None
        views = pixels if pixels.dim() == 4 else pixels[None]
        return [(key, view, grid) for key, view in zip(keys, views, strict=True)]


def _encode_and_write(
    vlm: LoadedVLM,
    loader: DataLoader[_KeyedPixels],
    view_count: int,
    shards: FeatureShards,
    should_stop: Callable[[], bool],
) -> FeatureLocations:
    """Compute the features of views and write them, shard by shard; return where they are."""
    level_values = vlm.processor.transform.level_values()
    locations: FeatureLocations = {}
    keys: list[bytes] = []
    features: list[Tensor] = []
    views = itertools.chain.from_iterable(loader)
    hidden = None if is_rank_zero() else True  # None: where there is no terminal
    counted = iter(tqdm(views, desc="features", total=view_count, unit="view", disable=hidden))
    while chunk := list(itertools.islice(counted, VIEWS_PER_CHUNK)):
        keys += [key for key, _, _ in chunk]
        levels = torch.stack([view for _, view, _ in chunk])
        grids = [grid for _, _, grid in chunk if grid is not None]
        features.append(encode_levels(vlm, levels, level_values, grids))
        if sum(chunk_features.nbytes for chunk_features in features) >= SHARD_BYTES:
            locations |= shards.write_shard(keys, torch.cat(features))
            keys, features = [], []
        if should_stop():
            break
    return locations | (shards.write_shard(keys, torch.cat(features)) if keys else {})


def encode_levels(
    vlm: LoadedVLM, levels: Tensor, level_values: Tensor, grids: Sequence[Grid] = ()
) -> Tensor:
    """Return the encoder's features of uint8 pixels, on the CPU, levels of an image stacked."""
    weight = next(vlm.vision.parameters())
    pixels = normalize_levels(levels.to(weight.device), level_values.to(weight.device))
    return stack_levels(vlm.vision(pixels.to(weight.dtype), *([grids] if grids else []))).cpu()
