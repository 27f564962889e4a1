"""The features of a frozen vision encoder, computed once before a stage and cached in a folder.

They belong to the encoder's weights, the image transform, the device and the precision: a change in
any of these leads to another subfolder of the cache.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vlbench.compat.lightning_internals import autocast_context, trainer_device
from vlbench.connector.levels import stack_levels
from vlbench.data.batch_sampler import StepDataset
from vlbench.data.feature_store import FeatureLocations, FeatureShards, FeatureStore, content_key
from vlbench.data.image_processing import ImageTransform
from vlbench.data.packing import normalize_levels
from vlbench.data.sample import LazyImage
from vlbench.distributed.launcher import isolate_data_worker
from vlbench.errors import BadSample, EnvironmentFailure, UserError
from vlbench.model.frozen_bf16 import FROZEN_DTYPE
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.system_errors import FULL_DISK_REASONS
from vlbench.train import run_report

READER_THREADS = 16  # image files that are read at once, to hash their content
IMAGES_PER_CHUNK = 32  # images in a forward pass of the encoder
SHARD_BYTES = 2**28  # of features in a shard, the most that an interruption loses


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
        with FileLock(subfolder / ".lock"):  # runs side by side would compute the same
            shards = FeatureShards(subfolder)
            return _fill_cache(vlm, steps, shards, trainer, num_workers, should_stop)
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
    ]
    digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=8)
    for name, value in _sorted_weights(vlm):
        digest.update(name.encode())
        value = value.float() if value.dtype is FROZEN_DTYPE else value  # the same numbers
        numbers = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        digest.update(numbers.data)
    return digest.hexdigest()


def _sorted_weights(vlm: LoadedVLM) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of the vision encoder by name, then those of a second one."""
    for number, encoder in enumerate(vlm.vision.encoders()):
        if number:
            settings = [encoder.feature_source, encoder.norm]
            yield json.dumps(settings), torch.zeros(0)
        yield from sorted(encoder.state_dict().items())


def _fill_cache(
    vlm: LoadedVLM,
    steps: StepDataset,
    shards: FeatureShards,
    trainer: pl.Trainer,
    num_workers: int,
    should_stop: Callable[[], bool],
) -> FeatureStore:
    """Compute what a cache lacks of the images of `steps`, and return all their features."""
    keys = dict(_keyed_images(steps))
    locations = shards.locate_features()
    missing = {key: image for image, key in keys.items() if key not in locations}
    if missing:
        loader: DataLoader[tuple[bytes, Tensor | None]] = DataLoader(
            _PixelDataset(vlm.processor.transform, list(missing.items())),
            batch_size=IMAGES_PER_CHUNK,
            collate_fn=list,
            num_workers=num_workers,
            worker_init_fn=isolate_data_worker,
        )
        with torch.no_grad(), autocast_context(trainer):
            locations |= _compute_features(vlm, loader, len(missing), shards, should_stop)
    known = {image: locations[key] for image, key in keys.items() if key in locations}
    return FeatureStore(shards, known)


def _keyed_images(steps: StepDataset) -> Iterator[tuple[LazyImage, bytes]]:
    """Yield every image of a stage once, with the key of its content.

    Images that cannot be read are left out: training meets them again and reports them.
    """
    with ThreadPoolExecutor(READER_THREADS) as pool:  # they wait for files, not for processors
        images = list(_unique_images(steps))
        for image, key in zip(images, pool.map(_content_key_or_empty, images), strict=True):
            if key:
                yield image, key


def _unique_images(steps: StepDataset) -> Iterator[LazyImage]:
    """Yield every image of a stage once, in the order of training."""
    known: set[LazyImage] = set()
    used = slice(1) if steps.encoder.sample_format == "caption" else slice(None)
    for position in range(steps.total_steps * steps.global_batch_size):
        try:
            images = steps.mixture[position].images[used]
        except BadSample:
            continue
        yield from (image for image in images if image not in known)
        known.update(images)


def _content_key_or_empty(image: LazyImage) -> bytes:
    try:
        return content_key(image)
    except UserError:
        return b""


@dataclass
class _PixelDataset(Dataset[tuple[bytes, "Tensor | None"]]):
    """Keys and uint8 pixels `[3, height, width]` of images; None for one that cannot be read."""

    transform: ImageTransform
    keyed_images: list[tuple[bytes, LazyImage]]

    def __len__(self) -> int:
        return len(self.keyed_images)

    def __getitem__(self, index: int) -> tuple[bytes, Tensor | None]:
        key, image = self.keyed_images[index]
        try:
            return key, self.transform.load_levels(image)
        except UserError:
            return key, None


def _compute_features(
    vlm: LoadedVLM,
    loader: DataLoader[tuple[bytes, Tensor | None]],
    image_count: int,
    shards: FeatureShards,
    should_stop: Callable[[], bool],
) -> FeatureLocations:
    """Compute the features of images and write them, shard by shard; return where they are."""
    level_values = vlm.processor.transform.level_values()
    blank = torch.zeros(1, *vlm.vision.pixel_shape, dtype=torch.uint8)
    image_bytes = _encode_levels(vlm, blank, level_values).nbytes
    _check_disk_space(image_count * image_bytes, image_count, shards.folder)
    locations: FeatureLocations = {}
    keys: list[bytes] = []
    features: list[Tensor] = []
    for chunk in tqdm(loader, desc="features", disable=None):
        pixels = {key: image for key, image in chunk if image is not None}
        if pixels:
            keys += pixels
            features.append(_encode_levels(vlm, torch.stack(list(pixels.values())), level_values))
        if len(keys) * image_bytes >= SHARD_BYTES:
            locations |= shards.write_shard(keys, torch.cat(features))
            keys, features = [], []
        if should_stop():
            break
    return locations | (shards.write_shard(keys, torch.cat(features)) if keys else {})


def _encode_levels(vlm: LoadedVLM, levels: Tensor, level_values: Tensor) -> Tensor:
    """Return the encoder's features of uint8 pixels, on the CPU, levels of an image stacked."""
    weight = next(vlm.vision.parameters())
    pixels = normalize_levels(levels.to(weight.device), level_values.to(weight.device))
    return stack_levels(vlm.vision(pixels.to(weight.dtype))).cpu()


def _check_disk_space(needed_bytes: int, image_count: int, folder: Path) -> None:
    """Print the bytes that the features will take; refuse before writing if it is too much."""
    free = shutil.disk_usage(folder).free
    run_report.print_status(
        f"features of {image_count:,} images take {run_report.format_bytes(needed_bytes)} in "
        f"{folder}, "
        f"{run_report.format_bytes(free)} are free"
    )
    if needed_bytes > free:
        raise UserError(
            f"trainer.feature_cache: the features of {image_count:,} images take "
            f"{run_report.format_bytes(needed_bytes)}, and {folder} has "
            f"{run_report.format_bytes(free)} left. Make room, "
            "name another folder, or leave it out"
        )
