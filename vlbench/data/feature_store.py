"""Features of a frozen vision encoder on disk: computed once, shared by connectors and epochs.

A folder has shards, safetensors files with

    features   [images, patches, width], in the vision encoder's dtype; of a connector that reads
               several blocks [images, blocks, patches, width]
    keys       [images, 16] uint8, a hash of each image's content
    sums       [images] int64, a checksum of each image's features

Of tiled images a row is a view, and its key stands for the image, its grid and the view in it.

A shard is written atomically, so a run that is stopped loses at most the one it was filling.
"""

from __future__ import annotations

import contextlib
import hashlib
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlbench.data.image_processing import ImageFile
from vlbench.data.image_tiling import TiledImage
from vlbench.data.record_images import EmbeddedImage
from vlbench.data.sample import LazyImage
from vlbench.text_files import replace_when_written

FeatureLocation = tuple[str, int]
"""Shard and row of an image, or of a view."""
FeatureLocations = dict[bytes, FeatureLocation]
"""Those of images or views by their keys."""
KEY_BYTES = 16  # bytes of an image's hash: two of 10^9 images collide with probability 10^-21


def content_key(lazy_image: LazyImage) -> bytes:
    """Return a hash of an image's content: of the bytes of a file, else of its pixels.

    Raises a UserError that names an image that cannot be read.
    """
    if isinstance(lazy_image, ImageFile | EmbeddedImage):
        content = lazy_image.read_bytes()
    else:
        image = lazy_image.open()
        content = f"{image.size}".encode() + image.tobytes()
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()


def view_keys(image: LazyImage) -> list[bytes]:
    """Return a key for each view of an image: of its content, the grid of its tiles and the view.

    An image that is not tiled is one view, whose key is that of the content. Raises a UserError
    that names an image that cannot be read.
    """
    if not isinstance(image, TiledImage):
        return [content_key(image)]
    content = content_key(image.image)
    return [
        hashlib.blake2b(content + repr((image.grid, view)).encode(), digest_size=KEY_BYTES).digest()
        for view in image.views
    ]


@dataclass
class FeatureShards:
    """The shards of a folder, memory-mapped; every process opens them itself."""

    folder: Path
    _open: dict[str, Any] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:  # memory maps cannot be pickled for a worker
        return {"folder": self.folder, "_open": {}}

    def find_damaged(self, is_checked: Callable[[str], bool]) -> set[str]:
        """Return the names of damaged shards of those to be checked; all they hold is read."""
        names = (path.name for path in self._list_shards())
        return {name for name in filter(is_checked, names) if self._is_damaged(name)}

    def delete_damaged(self, damaged: Iterable[str]) -> None:
        """Delete shards that `find_damaged` has found, unless they have been written anew since."""
        for name in filter(self._is_damaged, damaged):
            (self.folder / name).unlink(missing_ok=True)

    def has_shard(self, shard_name: str) -> bool:
        """Tell whether a shard is here; those of another machine may be on its own disk."""
        return (self.folder / shard_name).is_file()

    def locate_features(self) -> FeatureLocations:
        """Return shard and row of every stored image, without a look at the features."""
        locations: FeatureLocations = {}
        for path in self._list_shards():
            with contextlib.suppress(SafetensorError, OSError), safe_open(path, "pt") as file:
                keys: NDArray[np.uint8] = file.get_tensor("keys").numpy()
                locations |= {key.tobytes(): (path.name, row) for row, key in enumerate(keys)}
        return locations

    def _list_shards(self) -> list[Path]:
        return sorted(filter(Path.is_file, self.folder.glob("*.safetensors")))

    def read_features(self, shard_name: str, row: int) -> Tensor | None:
        """Return the features `[patches, width]` of an image, None when they are damaged."""
        try:
            file = self._open_shard(shard_name)
            features: Tensor = file.get_slice("features")[row]
            checksum = int(file.get_slice("sums")[row])
        except (SafetensorError, OSError):
            return None
        return features if feature_checksum(features) == checksum else None

    def write_shard(self, keys: Sequence[bytes], features: Tensor) -> FeatureLocations:
        """Write a shard of the features `[images, patches, width]`, and return their locations."""
        features = features.contiguous()
        all_keys = b"".join(keys)
        tensors = {
            "features": features,
            "keys": torch.frombuffer(bytearray(all_keys), dtype=torch.uint8).view(-1, KEY_BYTES),
            "sums": torch.tensor([feature_checksum(row) for row in features]),
        }
        name = hashlib.blake2b(all_keys, digest_size=KEY_BYTES).hexdigest() + ".safetensors"
        with replace_when_written(self.folder / name) as temporary:
            save_file(tensors, temporary)
        self._open.pop(name, None)
        return {key: (name, row) for row, key in enumerate(keys)}

    def _is_damaged(self, shard_name: str) -> bool:
        """Tell whether anything in a shard is damaged, or the shard is gone."""
        try:
            with safe_open(self.folder / shard_name, framework="pt") as file:
                features, sums = file.get_tensor("features"), file.get_tensor("sums")
                file.get_tensor("keys")
        except (SafetensorError, OSError):
            return True
        written: list[int] = sums.tolist()
        return [feature_checksum(row) for row in features] != written

    def _open_shard(self, shard_name: str) -> Any:
        if shard_name not in self._open:
            self._open[shard_name] = safe_open(self.folder / shard_name, framework="pt")
        return self._open[shard_name]


def feature_checksum(features: Tensor) -> int:
    """Return the CRC-32 of the bytes of an image's features."""
    return zlib.crc32(features.contiguous().view(torch.uint8).numpy().data)


@dataclass
class FeatureStore:
    """The stored features of the images of a stage."""

    shards: FeatureShards
    locations: dict[LazyImage, list[FeatureLocation]]
    """Shard and row of each view of each image."""

    def load_features(self, images: Sequence[LazyImage]) -> Tensor | None:
        """Return `[views, patches, width]`; None when any is missing or damaged."""
        if not images or any(image not in self.locations for image in images):
            return None
        read = [
            self.shards.read_features(*location)
            for image in images
            for location in self.locations[image]
        ]
        valid = [features for features in read if features is not None]
        return torch.stack(valid) if len(valid) == len(read) else None
