"""Features of a frozen tower, kept on disk: computed once, shared by connectors and epochs.

A folder holds shards, safetensors files with

    features   [pictures, patches, width], in the tower's own type
    keys       [pictures, 16] uint8, a hash of each picture's content
    sums       [pictures] int64, a checksum of each picture's features

A shard is written whole or not at all, so a run that is stopped loses the open one at most.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlbench.data.image_processing import ImageFile
from vlbench.data.sample import LazyImage
from vlbench.errors import UserError

FeatureLocations = dict[bytes, tuple[str, int]]
"""Shard and row of each picture, by its key."""
KEY_BYTES = 16  # bytes of a picture's hash: two of 10^9 pictures collide with probability 10^-21


def content_key(lazy_image: LazyImage) -> bytes:
    """Return a hash of what a picture shows: of the bytes of a file, else of its pixels.

    Raises a Mistake that names a picture that cannot be read.
    """
    if isinstance(lazy_image, ImageFile):
        try:
            content = Path(lazy_image.path).read_bytes()
        except OSError as error:
            raise UserError(f"image {lazy_image.name}: {error.strerror}") from error
    else:
        image = lazy_image.open()
        content = f"{image.size}".encode() + image.tobytes()
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()


@dataclass
class FeatureShards:
    """The shards of a folder, read through memory maps; opened anew in every process."""

    folder: Path
    _open: dict[str, Any] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:  # memory maps cannot travel to a worker
        return {"folder": self.folder, "_open": {}}

    def locate_features(self) -> FeatureLocations:
        """Return shard and row of every picture that is kept; a damaged shard is removed first."""
        found = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            keys = self._read_valid_keys(path)
            if keys is None:
                path.unlink()
                continue
            for row, key in enumerate(keys):
                found[key.tobytes()] = (path.name, row)
        return found

    def _read_valid_keys(self, path: Path) -> np.ndarray | None:
        """Return the keys `[pictures, 16]` of a shard, None if anything in it is damaged."""
        try:
            with safe_open(path, framework="pt") as file:
                features, sums = file.get_tensor("features"), file.get_tensor("sums")
                keys = file.get_tensor("keys").numpy()
        except (SafetensorError, OSError):
            return None
        return keys if [feature_checksum(one) for one in features] == sums.tolist() else None

    def read_features(self, shard_name: str, row: int) -> Tensor | None:
        """Return the features `[patches, width]` of a picture, None when they are damaged."""
        try:
            file = self._open_shard(shard_name)
            features = file.get_slice("features")[row]
            kept = int(file.get_slice("sums")[row])
        except (SafetensorError, OSError):
            return None
        return features if feature_checksum(features) == kept else None

    def write_shard(self, keys: Sequence[bytes], features: Tensor) -> FeatureLocations:
        """Add a shard of the features `[pictures, patches, width]`, and return their places."""
        features = features.contiguous()
        tensors = {
            "features": features,
            "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(
                -1, KEY_BYTES
            ),
            "sums": torch.tensor([feature_checksum(one) for one in features]),
        }
        name = hashlib.blake2b(b"".join(keys), digest_size=KEY_BYTES).hexdigest() + ".safetensors"
        writing = self.folder / f".{name}-{os.getpid()}"
        try:
            save_file(tensors, writing)
            writing.replace(self.folder / name)
        finally:
            writing.unlink(missing_ok=True)
        self._open.pop(name, None)
        return {key: (name, row) for row, key in enumerate(keys)}

    def _open_shard(self, shard_name: str) -> Any:
        if shard_name not in self._open:
            self._open[shard_name] = safe_open(self.folder / shard_name, framework="pt")
        return self._open[shard_name]


def feature_checksum(features: Tensor) -> int:
    """Return the checksum of a picture's features, of their bytes."""
    return zlib.crc32(features.contiguous().view(torch.uint8).numpy().data)


@dataclass
class FeatureStore:
    """The features of the pictures of a stage."""

    shards: FeatureShards
    locations: dict[LazyImage, tuple[str, int]]
    """Shard and row of each picture."""

    def load_features(self, images: Sequence[LazyImage]) -> Tensor | None:
        """Return `[pictures, patches, width]`; None when any is missing or damaged."""
        places = [self.locations.get(picture) for picture in images]
        found = [self.shards.read_features(*place) for place in places if place]
        whole = [features for features in found if features is not None]
        return torch.stack(whole) if whole and len(whole) == len(images) else None
