"""The features of a frozen vision encoder, computed once before a stage and cached in a folder.

They belong to the encoder and its weights, the image transform, the device and the precision: a
change in any of these leads to another subfolder of the cache. The processes of a run divide the
work: each hashes its share of the images, checks its share of the shards and computes its share of
what is missing. Which share is whose follows from data and contents, not from what a process finds
on the disk: processes whose views of a network disk differ cannot mix up images.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from filelock import FileLock
from torch import Tensor

from vlbench.compat.lightning_internals import trainer_device
from vlbench.data.batch_sampler import StepDataset
from vlbench.data.feature_store import FeatureLocations, FeatureShards, FeatureStore, view_keys
from vlbench.data.sample import LazyImage
from vlbench.distributed import collectives
from vlbench.errors import BadSample, EnvironmentFailure, UserError
from vlbench.model.frozen_bf16 import FROZEN_DTYPE
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.vision_encoder import VisionEncoder
from vlbench.model.weights import vision_layouts
from vlbench.system_errors import FULL_DISK_REASONS
from vlbench.train.feature_computation import ImagesByKeys, check_disk_space, compute_features

READER_THREADS = 16  # image files that are read at once, to hash their content
K = TypeVar("K")
T = TypeVar("T")
_Place = tuple[int, int]
"""Where a stage first shows an image: the position of the sample, and the image's index in it."""


def cache_features(
    vlm: LoadedVLM,
    steps: StepDataset,
    folder: Path,
    trainer: pl.Trainer,
    num_workers: int,
    should_stop: Callable[[], bool],
) -> FeatureStore:
    """Return the features of all images of `steps`; those that `folder` lacks are computed.

    All processes of a run have to call it.

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
    cache = _SharedCache(vlm, folder, FeatureShards(subfolder), trainer, num_workers, should_stop)
    cache.call_together(cache.prepare)
    # images and shards are read without the lock: other runs need not wait for that
    images = cache.list_images(steps)
    locations = cache.locate_or_compute(images)
    known = {
        image: [locations[key] for key in keys]
        for image, keys in images.items()
        if all(key in locations for key in keys)
    }
    return FeatureStore(cache.shards, known)


@dataclass
class _SharedCache:
    """A cache that the processes of a run fill together: all of them call its methods in turn."""

    vlm: LoadedVLM
    folder: Path  # as the user named it
    shards: FeatureShards
    trainer: pl.Trainer
    num_workers: int
    should_stop: Callable[[], bool]

    def call_together(self, work: Callable[[], T]) -> T:
        """Call a function in all processes; if it fails in one, all end and one says why."""
        return collectives.call_on_all_ranks(lambda: self._call_with_reasons(work))

    def _call_with_reasons(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except OSError as error:
            if error.errno in FULL_DISK_REASONS:
                raise EnvironmentFailure(
                    f"{FULL_DISK_REASONS[error.errno]}: features cannot be kept in "
                    f"{self.shards.folder}. What is kept is whole, and is used when the run goes "
                    "on: make room, or leave trainer.feature_cache out"
                ) from error
            raise UserError(f"trainer.feature_cache={self.folder}: {error.strerror}") from error

    def prepare(self) -> None:
        """Make the folder, and move the encoder to its device."""
        self.shards.folder.mkdir(parents=True, exist_ok=True)
        for encoder in self.vlm.vision.encoders():
            encoder.to(trainer_device(self.trainer))

    def list_images(self, steps: StepDataset) -> dict[LazyImage, list[bytes]]:
        """Return every image of a stage, in the order of training, with the keys of its views.

        Images that cannot be read are left out: training meets them again and reports them.
        """
        places = dict(_unique_images(steps))
        own = {place: image for image, place in places.items() if _is_own_text(f"{place}")}

        def hash_images() -> dict[_Place, list[bytes]]:
            with ThreadPoolExecutor(READER_THREADS) as pool:  # they wait for files
                return dict(zip(own, pool.map(_view_keys_or_none, own.values()), strict=True))

        keys = _gather_entries(self.call_together(hash_images))
        return {image: keys[place] for image, place in places.items() if keys.get(place)}

    def locate_or_compute(self, images: Mapping[LazyImage, Sequence[bytes]]) -> FeatureLocations:
        """Return where the features of images are, once those that are missing are computed."""
        own_damaged = self.call_together(lambda: self.shards.find_damaged(_is_own_text))
        damaged = set[str]().union(*collectives.all_gather_objects(own_damaged))
        locations = self.shards.locate_features()
        is_incomplete = bool(damaged or _missing_images(images, locations))
        if not any(collectives.all_gather_objects(is_incomplete)):
            return locations
        with self._locked_by_first_process():
            self.call_together(lambda: self.shards.delete_damaged(damaged))
            locations = self.shards.locate_features()  # with what other runs have written meanwhile
            missing = _missing_images(images, locations)
            computed = _gather_entries(self.call_together(lambda: self._compute_share(missing)))
        here = {key: at for key, at in computed.items() if self.shards.has_shard(at[0])}
        # without a shared disk each machine has what its own processes have computed
        elsewhere = {
            keys: image
            for keys, image in missing.items()
            if any(key in computed and key not in here for key in keys)
        }
        return locations | here | self.call_together(lambda: self._compute_alone(elsewhere))

    @contextlib.contextmanager
    def _locked_by_first_process(self) -> Iterator[None]:
        """Keep other runs, which would compute the same, from computing."""
        lock = FileLock(self.shards.folder / ".lock")
        self.call_together(lambda: collectives.is_rank_zero() and bool(lock.acquire()))
        try:
            yield
        finally:
            lock.release()

    def _compute_share(self, missing: ImagesByKeys) -> FeatureLocations:
        """Compute this process's share of what is missing."""
        if missing:
            check_disk_space(self.vlm, sum(map(len, missing)), self.shards, self.trainer)
        own = {keys: image for keys, image in missing.items() if _is_own(int.from_bytes(keys[0]))}
        return self._compute(own)

    def _compute_alone(self, images: ImagesByKeys) -> FeatureLocations:
        """Compute all of these; of the processes of a machine the first one does."""
        if not images:
            return {}
        with FileLock(self.shards.folder / ".lock"):
            stored = self.shards.locate_features()
            absent = {keys: one for keys, one in images.items() if not stored.keys() >= {*keys}}
            return stored | self._compute(absent)

    def _compute(self, images: ImagesByKeys) -> FeatureLocations:
        return compute_features(
            self.vlm, images, self.shards, self.trainer, self.num_workers, self.should_stop
        )


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
    images: Mapping[LazyImage, Sequence[bytes]], locations: FeatureLocations
) -> dict[tuple[bytes, ...], LazyImage]:
    """Return the images of which a cache lacks a view, by the keys of their views."""
    return {
        tuple(keys): image
        for image, keys in images.items()
        if any(key not in locations for key in keys)
    }


def _unique_images(steps: StepDataset) -> Iterator[tuple[LazyImage, _Place]]:
    """Yield every image of a stage once, in the order of training."""
    known: set[LazyImage] = set()
    for position in range(steps.total_steps * steps.global_batch_size):
        try:
            images = steps.encoder.list_images(steps.mixture[position])
        except (BadSample, UserError):
            continue
        for number, image in enumerate(images):
            if image not in known:
                known.add(image)
                yield image, (position, number)


def _view_keys_or_none(image: LazyImage) -> list[bytes]:
    try:
        return view_keys(image)
    except UserError:
        return []


def _is_own(number: int) -> bool:
    """Tell whether this process does what has this number: every process has its share."""
    return number % collectives.world_size() == collectives.rank()


def _is_own_text(text: str) -> bool:
    return _is_own(zlib.crc32(text.encode()))


def _gather_entries(entries: Mapping[K, T]) -> dict[K, T]:
    """Return the entries of all processes."""
    gathered: dict[K, T] = {}
    for of_process in collectives.all_gather_objects(entries):
        gathered |= of_process
    return gathered
