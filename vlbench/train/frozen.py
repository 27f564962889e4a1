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

from vlbench.data.features import Features, Places, Shards, content_key
from vlbench.data.images import ImageTransform
from vlbench.data.sample import Picture
from vlbench.data.steps import Steps
from vlbench.mistakes import BadSample, Mistake
from vlbench.model.held import HELD
from vlbench.model.vlm import VLM
from vlbench.train import report
from vlbench.train.launch import apart

READERS = 16  # files that are read at once, to know what they hold
CHUNK = 32  # pictures that the tower sees at once
SHARD_BYTES = 2**28  # of features in a shard: what an interruption loses at most


def remember(
    vlm: VLM,
    steps: Steps,
    folder: Path,
    trainer: pl.Trainer,
    workers: int,
    stop: Callable[[], bool],
) -> Features:
    """Return the features of all pictures of `steps`; what `folder` lacks is computed and kept.

    The tower runs where and in the precision in which `trainer` will train; `workers` processes
    prepare pictures. When `stop` says so, those that are known by then are returned.
    Raises a Mistake when the disk has no room; what is kept by then stays.
    """
    device = trainer.strategy.root_device
    own = folder / identity(vlm, f"{device.type} {trainer.precision}")
    try:
        own.mkdir(parents=True, exist_ok=True)
        vlm.vision.to(device)
        with FileLock(own / ".lock"):  # runs side by side would compute the same
            return _filled(vlm, steps, Shards(own), trainer, workers, stop)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise Mistake(
                f"the disk is full: features cannot be kept in {own}. What is kept is whole, and "
                "is used when the run goes on: make room, or leave trainer.feature_cache out"
            ) from error
        raise Mistake(f"trainer.feature_cache={folder}: {error.strerror}") from error


def identity(vlm: VLM, arithmetic: str) -> str:
    """Return 16 characters that change when the features of a picture may change."""
    tower = vlm.vision
    about = [tower.layer, tower.norm, tower.class_token, vlm.transform.hash(), arithmetic]
    digest = hashlib.blake2b(json.dumps(about).encode(), digest_size=8)
    for name, value in sorted(tower.state_dict().items()):
        digest.update(name.encode())
        value = value.float() if value.dtype is HELD else value  # the same numbers
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _filled(
    vlm: VLM,
    steps: Steps,
    shards: Shards,
    trainer: pl.Trainer,
    workers: int,
    stop: Callable[[], bool],
) -> Features:
    keys = dict(_keys(steps))
    kept = shards.places()
    missing = {key: picture for picture, key in keys.items() if key not in kept}
    if missing:
        loader: DataLoader = DataLoader(
            _Pixels(vlm.transform, list(missing.items())),
            batch_size=CHUNK,
            collate_fn=list,
            num_workers=workers,
            worker_init_fn=apart,
        )
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            kept |= _compute(vlm, loader, len(missing), shards, stop)
    return Features(shards, {picture: kept[key] for picture, key in keys.items() if key in kept})


def _keys(steps: Steps) -> Iterator[tuple[Picture, bytes]]:
    """Give every picture of a stage once, with its key.

    What cannot be read is left out: training meets it again and reports it.
    """
    with ThreadPoolExecutor(READERS) as pool:  # of files, not of processors
        pictures = list(_pictures(steps))
        for picture, key in zip(pictures, pool.map(_key, pictures), strict=True):
            if key:
                yield picture, key


def _pictures(steps: Steps) -> Iterator[Picture]:
    met: set[Picture] = set()
    shown = slice(1) if steps.form == "caption" else slice(None)
    for position in range(steps.total * steps.batch):
        try:
            pictures = steps.mixture[position].pictures[shown]
        except BadSample:
            continue
        yield from (picture for picture in pictures if picture not in met)
        met.update(pictures)


def _key(picture: Picture) -> bytes:
    try:
        return content_key(picture)
    except Mistake:
        return b""


@dataclass
class _Pixels(Dataset[tuple[bytes, "Tensor | None"]]):
    """Keys and pixels `[3, height, width]` of pictures; None for one that cannot be read."""

    transform: ImageTransform
    pictures: list[tuple[bytes, Picture]]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[bytes, Tensor | None]:
        key, picture = self.pictures[index]
        try:
            return key, self.transform.of(picture)
        except Mistake:
            return key, None


def _compute(
    vlm: VLM, loader: DataLoader, pictures: int, shards: Shards, stop: Callable[[], bool]
) -> Places:
    """Compute the features of pictures and write them, shard by shard; return where they are."""
    side = vlm.vision.image_size
    each = _see(vlm, torch.zeros(1, 3, side, side)).nbytes
    _check_room(pictures * each, pictures, shards.folder)
    places: Places = {}
    keys: list[bytes] = []
    features: list[Tensor] = []
    for chunk in tqdm(loader, desc="features", disable=None):
        pixels = {key: made for key, made in chunk if made is not None}
        if pixels:
            keys += pixels
            features.append(_see(vlm, torch.stack(list(pixels.values()))))
        if len(keys) * each >= SHARD_BYTES:
            places |= shards.write(keys, torch.cat(features))
            keys, features = [], []
        if stop():
            break
    return places | (shards.write(keys, torch.cat(features)) if keys else {})


def _see(vlm: VLM, pixels: Tensor) -> Tensor:
    """Return what the tower makes of pixels, on the CPU."""
    weight = next(vlm.vision.parameters())
    return vlm.vision(pixels.to(weight.device, weight.dtype)).cpu()


def _check_room(needed: int, pictures: int, folder: Path) -> None:
    """Say what the features will take, and refuse before anything is written if it is too much."""
    free = shutil.disk_usage(folder).free
    report.say(
        f"features of {pictures:,} pictures take {report.size_of(needed)} in {folder}, "
        f"{report.size_of(free)} are free"
    )
    if needed > free:
        raise Mistake(
            f"trainer.feature_cache: the features of {pictures:,} pictures take "
            f"{report.size_of(needed)}, and {folder} has {report.size_of(free)} left. Make room, "
            "name another folder, or leave it out"
        )
