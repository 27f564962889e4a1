"""Before a stage with a frozen tower: its features are computed once and kept in a folder.

They belong to the tower's weights, the image transform and the arithmetic: a change in any of these
is another folder inside of the given one.
"""

from __future__ import annotations

import errno
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
from vlbench.data.batch_sampler import StepDataset
from vlbench.data.feature_store import FeatureLocations, FeatureShards, FeatureStore, content_key
from vlbench.data.image_processing import ImageTransform
from vlbench.data.sample import LazyImage
from vlbench.distributed.launcher import isolate_data_worker
from vlbench.errors import BadSample, UserError
from vlbench.model.frozen_bf16 import FROZEN_DTYPE
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.train import run_report

READER_THREADS = 16  # files that are read at once, to know what they hold
IMAGES_PER_CHUNK = 32  # pictures that the tower sees at once
SHARD_BYTES = 2**28  # of features in a shard: what an interruption loses at most


def cache_features(
    vlm: LoadedVLM,
    steps: StepDataset,
    folder: Path,
    trainer: pl.Trainer,
    num_workers: int,
    should_stop: Callable[[], bool],
) -> FeatureStore:
    """Return the features of all pictures of `steps`; what `folder` lacks is computed and kept.

    The tower runs where and in the precision in which `trainer` will train; `workers` processes
    prepare pictures. When `stop` says so, those that are known by then are returned.
    Raises a Mistake when the disk has no room; what is kept by then stays.
    """
    device = trainer_device(trainer)
    own = folder / encoder_fingerprint(vlm, f"{device.type} {trainer.precision}")
    try:
        own.mkdir(parents=True, exist_ok=True)
        vlm.vision.to(device)
        with FileLock(own / ".lock"):  # runs side by side would compute the same
            return _fill_cache(vlm, steps, FeatureShards(own), trainer, num_workers, should_stop)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"the disk is full: features cannot be kept in {own}. What is kept is whole, and "
                "is used when the run goes on: make room, or leave trainer.feature_cache out"
            ) from error
        raise UserError(f"trainer.feature_cache={folder}: {error.strerror}") from error


def encoder_fingerprint(vlm: LoadedVLM, arithmetic: str) -> str:
    """Return 16 characters that change when the features of a picture may change."""
    tower = vlm.vision
    about = [
        tower.layer,
        tower.norm,
        tower.class_token,
        vlm.processor.transform.transform_hash(),
        arithmetic,
    ]
    digest = hashlib.blake2b(json.dumps(about).encode(), digest_size=8)
    for name, value in sorted(tower.state_dict().items()):
        digest.update(name.encode())
        value = value.float() if value.dtype is FROZEN_DTYPE else value  # the same numbers
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _fill_cache(
    vlm: LoadedVLM,
    steps: StepDataset,
    shards: FeatureShards,
    trainer: pl.Trainer,
    num_workers: int,
    should_stop: Callable[[], bool],
) -> FeatureStore:
    keys = dict(_keyed_images(steps))
    kept = shards.locate_features()
    missing = {key: picture for picture, key in keys.items() if key not in kept}
    if missing:
        loader: DataLoader = DataLoader(
            _PixelDataset(vlm.processor.transform, list(missing.items())),
            batch_size=IMAGES_PER_CHUNK,
            collate_fn=list,
            num_workers=num_workers,
            worker_init_fn=isolate_data_worker,
        )
        with torch.no_grad(), autocast_context(trainer):
            kept |= _compute_features(vlm, loader, len(missing), shards, should_stop)
    return FeatureStore(
        shards, {picture: kept[key] for picture, key in keys.items() if key in kept}
    )


def _keyed_images(steps: StepDataset) -> Iterator[tuple[LazyImage, bytes]]:
    """Give every picture of a stage once, with its key.

    What cannot be read is left out: training meets it again and reports it.
    """
    with ThreadPoolExecutor(READER_THREADS) as pool:  # of files, not of processors
        pictures = list(_unique_images(steps))
        for picture, key in zip(pictures, pool.map(_content_key_or_empty, pictures), strict=True):
            if key:
                yield picture, key


def _unique_images(steps: StepDataset) -> Iterator[LazyImage]:
    met: set[LazyImage] = set()
    shown = slice(1) if steps.encoder.sample_format == "caption" else slice(None)
    for position in range(steps.total_steps * steps.global_batch_size):
        try:
            pictures = steps.mixture[position].images[shown]
        except BadSample:
            continue
        yield from (picture for picture in pictures if picture not in met)
        met.update(pictures)


def _content_key_or_empty(image: LazyImage) -> bytes:
    try:
        return content_key(image)
    except UserError:
        return b""


@dataclass
class _PixelDataset(Dataset[tuple[bytes, "Tensor | None"]]):
    """Keys and pixels `[3, height, width]` of pictures; None for one that cannot be read."""

    transform: ImageTransform
    keyed_images: list[tuple[bytes, LazyImage]]

    def __len__(self) -> int:
        return len(self.keyed_images)

    def __getitem__(self, index: int) -> tuple[bytes, Tensor | None]:
        key, picture = self.keyed_images[index]
        try:
            return key, self.transform.load_pixels(picture)
        except UserError:
            return key, None


def _compute_features(
    vlm: LoadedVLM,
    loader: DataLoader,
    image_count: int,
    shards: FeatureShards,
    should_stop: Callable[[], bool],
) -> FeatureLocations:
    """Compute the features of pictures and write them, shard by shard; return where they are."""
    side = vlm.vision.image_size
    each = _encode_pixels(vlm, torch.zeros(1, 3, side, side)).nbytes
    _check_disk_space(image_count * each, image_count, shards.folder)
    places: FeatureLocations = {}
    keys: list[bytes] = []
    features: list[Tensor] = []
    for chunk in tqdm(loader, desc="features", disable=None):
        pixels = {key: made for key, made in chunk if made is not None}
        if pixels:
            keys += pixels
            features.append(_encode_pixels(vlm, torch.stack(list(pixels.values()))))
        if len(keys) * each >= SHARD_BYTES:
            places |= shards.write_shard(keys, torch.cat(features))
            keys, features = [], []
        if should_stop():
            break
    return places | (shards.write_shard(keys, torch.cat(features)) if keys else {})


def _encode_pixels(vlm: LoadedVLM, pixels: Tensor) -> Tensor:
    """Return what the tower makes of pixels, on the CPU."""
    weight = next(vlm.vision.parameters())
    return vlm.vision(pixels.to(weight.device, weight.dtype)).cpu()


def _check_disk_space(needed_bytes: int, image_count: int, folder: Path) -> None:
    """Say what the features will take, and refuse before anything is written if it is too much."""
    free = shutil.disk_usage(folder).free
    run_report.print_status(
        f"features of {image_count:,} pictures take {run_report.format_bytes(needed_bytes)} in "
        f"{folder}, "
        f"{run_report.format_bytes(free)} are free"
    )
    if needed_bytes > free:
        raise UserError(
            f"trainer.feature_cache: the features of {image_count:,} pictures take "
            f"{run_report.format_bytes(needed_bytes)}, and {folder} has "
            f"{run_report.format_bytes(free)} left. Make room, "
            "name another folder, or leave it out"
        )
