"""The features of a frozen vision encoder, computed once before a stage and cached in a folder.

They belong to the encoder and its weights, the image transform, the device and the precision: a
change in any of these leads to another subfolder of the cache.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vlbench.compat.lightning_internals import autocast_context, trainer_device
from vlbench.connector.levels import stack_levels
from vlbench.data.batch_sampler import StepDataset
from vlbench.data.feature_store import FeatureLocations, FeatureShards, FeatureStore, view_keys
from vlbench.data.image_processing import ImageTransform
from vlbench.data.image_tiling import Grid
from vlbench.data.native_aspect import NativeImage
from vlbench.data.packing import normalize_levels
from vlbench.data.sample import LazyImage
from vlbench.distributed.launcher import isolate_data_worker
from vlbench.errors import BadSample, EnvironmentFailure, UserError
from vlbench.model.frozen_bf16 import FROZEN_DTYPE
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.vision_encoder import VisionEncoder
from vlbench.model.weights import vision_layouts
from vlbench.system_errors import FULL_DISK_REASONS
from vlbench.train import run_report

READER_THREADS = 16  # image files that are read at once, to hash their content
VIEWS_PER_CHUNK = 32  # views of images in a forward pass of the encoder
SHARD_BYTES = 2**28  # of features in a shard, the most that an interruption loses
_KeyedPixels = list[tuple[bytes, Tensor, Grid | None]]
"""The views of an image: their keys, their uint8 pixels `[3, height, width]`, and rows and columns
of patches where the image keeps its aspect ratio."""


def cache_features(
    vlm: LoadedVLM,
    steps: StepDataset,
    folder: Path,
    trainer: pl.Trainer,
    num_workers: int,
    should_stop: Callable[[], bool],
) -> FeatureStore:
    """Return the features of all images of `steps`; those that `folder` lacks are computed.

    Args:
        vlm: The model whose vision encoder is frozen, and its image transform.
        steps: All optimizer steps of the stage.
        folder: The cache, `trainer.feature_cache`.
        trainer: Its device and precision are used.
        num_workers: Processes that load images; 0 for this one.
        should_stop: Asked after every forward pass; when it is true, the features that are known
            by then are returned.

    Raises:
        UserError: The disk is full, or the folder cannot be written. What is cached by then stays.

    """
    device = trainer_device(trainer)
    subfolder = folder / encoder_fingerprint(vlm, f"{device.type} {trainer.precision}")
    try:
        subfolder.mkdir(parents=True, exist_ok=True)
        for encoder in vlm.vision.encoders():
            encoder.to(device)
        # images and shards are read before the lock: all processes of a run read them at once
        keys = dict(_keyed_images(steps))
        shards = FeatureShards(subfolder)
        damaged, locations = shards.find_damaged(), shards.locate_features()
        if damaged or _missing_images(keys, locations):
            with FileLock(subfolder / ".lock"):  # others would compute the same
                shards.delete_damaged(damaged)
                locations = shards.locate_features()  # with what others have written meanwhile
                missing = _missing_images(keys, locations)
                locations |= _fill_cache(vlm, missing, shards, trainer, num_workers, should_stop)
        known = {
            image: [locations[key] for key in of_image]
            for image, of_image in keys.items()
            if all(key in locations for key in of_image)
        }
        return FeatureStore(shards, known)
    except OSError as error:
        if error.errno in FULL_DISK_REASONS:
            raise EnvironmentFailure(
                f"{FULL_DISK_REASONS[error.errno]}: features cannot be kept in {subfolder}. What "
                "is kept is whole, and is used when the run goes on: make room, or leave "
                "trainer.feature_cache out"
            ) from error
        raise UserError(f"trainer.feature_cache={folder}: {error.strerror}") from error


def encoder_fingerprint(vlm: LoadedVLM, arithmetic: str) -> str:
    """Return 16 hexadecimal digits that change when the features of an image may change.

    `arithmetic` names device and precision.
    """
    encoder = vlm.vision
    settings = [
        encoder.feature_source,
        encoder.norm,
        encoder.class_token,
        vlm.processor.transform.transform_hash(),
        arithmetic,
        [_computation(one) for one in encoder.encoders()],
    ]
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8)
    for name, value in _sorted_weights(vlm):
        digest.update(name.encode())
        value = value.float() if value.dtype is FROZEN_DTYPE else value  # the same numbers
        numbers = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        digest.update(numbers.data)
    return digest.hexdigest()


def _computation(encoder: VisionEncoder) -> dict[str, Any]:
    """Return what the same weights compute: activation, epsilons, heads, which no weight tells."""
    if encoder.config is not None:
        return encoder.config.computation()
    return vision_layouts.to_hf_vision_config(encoder.visual)  # a released model's


def _sorted_weights(vlm: LoadedVLM) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of the vision encoder by name, then those of a second one."""
    for number, encoder in enumerate(vlm.vision.encoders()):
        if number:
            settings = [encoder.feature_source, encoder.norm]
            yield json.dumps(settings), torch.zeros(0)
        yield from sorted(encoder.state_dict().items())


def _missing_images(
    keys: Mapping[LazyImage, Sequence[bytes]], locations: FeatureLocations
) -> dict[tuple[bytes, ...], LazyImage]:
    """Return the images of which a cache lacks a view, by the keys of their views."""
    return {
        tuple(of_image): image
        for image, of_image in keys.items()
        if any(key not in locations for key in of_image)
    }


def _fill_cache(
    vlm: LoadedVLM,
    missing: Mapping[tuple[bytes, ...], LazyImage],
    shards: FeatureShards,
    trainer: pl.Trainer,
    num_workers: int,
    should_stop: Callable[[], bool],
) -> FeatureLocations:
    """Compute and write the features of images; return where they are."""
    if not missing:
        return {}
    loader: DataLoader[_KeyedPixels] = DataLoader(
        _PixelDataset(vlm.processor.transform, list(missing.items())),
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=isolate_data_worker,
    )
    view_count = sum(map(len, missing))
    with torch.no_grad(), autocast_context(trainer):
        return _compute_features(vlm, loader, view_count, shards, should_stop)


def _keyed_images(steps: StepDataset) -> Iterator[tuple[LazyImage, list[bytes]]]:
    """Yield every image of a stage once, with the keys of its views.

    Images that cannot be read are left out: training meets them again and reports them.
    """
    with ThreadPoolExecutor(READER_THREADS) as pool:  # they wait for files, not for processors
        images = list(_unique_images(steps))
        for image, keys in zip(images, pool.map(_view_keys_or_none, images), strict=True):
            if keys:
                yield image, keys


def _unique_images(steps: StepDataset) -> Iterator[LazyImage]:
    """Yield every image of a stage once, in the order of training."""
    known: set[LazyImage] = set()
    for position in range(steps.total_steps * steps.global_batch_size):
        try:
            images = steps.encoder.list_images(steps.mixture[position])
        except (BadSample, UserError):
            continue
        yield from (image for image in images if image not in known)
        known.update(images)


def _view_keys_or_none(image: LazyImage) -> list[bytes]:
    try:
        return view_keys(image)
    except UserError:
        return []


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


def _compute_features(
    vlm: LoadedVLM,
    loader: DataLoader[_KeyedPixels],
    view_count: int,
    shards: FeatureShards,
    should_stop: Callable[[], bool],
) -> FeatureLocations:
    """Compute the features of views and write them, shard by shard; return where they are."""
    level_values = vlm.processor.transform.level_values()
    blank = torch.zeros(1, *vlm.vision.pixel_shape, dtype=torch.uint8)
    view_bytes = _encode_levels(vlm, blank, level_values).nbytes
    what = f"{view_count:,} {'views of images' if vlm.processor.view_settings else 'images'}"
    _check_disk_space(view_count * view_bytes, what, shards.folder)
    locations: FeatureLocations = {}
    keys: list[bytes] = []
    features: list[Tensor] = []
    views = itertools.chain.from_iterable(loader)
    counted = iter(tqdm(views, desc="features", total=view_count, unit="view", disable=None))
    while chunk := list(itertools.islice(counted, VIEWS_PER_CHUNK)):
        keys += [key for key, _, _ in chunk]
        levels = torch.stack([view for _, view, _ in chunk])
        grids = [grid for _, _, grid in chunk if grid is not None]
        features.append(_encode_levels(vlm, levels, level_values, grids))
        if len(keys) * view_bytes >= SHARD_BYTES:
            locations |= shards.write_shard(keys, torch.cat(features))
            keys, features = [], []
        if should_stop():
            break
    return locations | (shards.write_shard(keys, torch.cat(features)) if keys else {})


def _encode_levels(
    vlm: LoadedVLM, levels: Tensor, level_values: Tensor, grids: Sequence[Grid] = ()
) -> Tensor:
    """Return the encoder's features of uint8 pixels, on the CPU, levels of an image stacked."""
    weight = next(vlm.vision.parameters())
    pixels = normalize_levels(levels.to(weight.device), level_values.to(weight.device))
    return stack_levels(vlm.vision(pixels.to(weight.dtype), *([grids] if grids else []))).cpu()


def _check_disk_space(needed_bytes: int, what: str, folder: Path) -> None:
    """Print the bytes that the features will take; refuse before writing if it is too much."""
    free = shutil.disk_usage(folder).free
    run_report.print_status(
        f"features of {what} take {run_report.format_bytes(needed_bytes)} in {folder}, "
        f"{run_report.format_bytes(free)} are free"
    )
    if needed_bytes > free:
        raise UserError(
            f"trainer.feature_cache: the features of {what} take "
            f"{run_report.format_bytes(needed_bytes)}, and {folder} has "
            f"{run_report.format_bytes(free)} left. Make room, "
            "name another folder, or leave it out"
        )
