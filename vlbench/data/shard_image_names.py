"""Which image of a sample in a shard a name in its record means. Imports no torch.

In a tar file of the WebDataset kind an image is called KEY.SUFFIX, and the record beside it has the
name that the image had before: `coco/0001.jpg` of `000.jpg`. Two names never mean one image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

from vlbench.data.shard_index import IMAGE_EXTENSIONS
from vlbench.errors import BadSample

Image = TypeVar("Image")


class ShardImageNames(Generic[Image]):
    """The images of one sample, found by the names in its record."""

    def __init__(self, sample_name: str, key: str, members: Mapping[str, Image]) -> None:
        """Look names up in the sample's `members` by suffix (`jpg`, `0.jpg`), called KEY.SUFFIX."""
        self.sample_name = sample_name
        self.stem = key.rpartition("/")[2]
        self.members = members
        self.image_suffixes = [suffix for suffix in members if is_image_member(suffix)]
        self._name_of: dict[str, str] = {}
        """By suffix the name that an image was found by."""

    def find(self, image_name: str) -> Image:
        """Return the image that a record names, or raise BadSample.

        Found are KEY.SUFFIX and SUFFIX, either after some folders. A name with another stem means
        the image with its suffix: a numbered one (`photo.0.jpg`), or the only one of its extension.
        """
        suffix = self._find_suffix(image_name)
        if not suffix:
            raise self._refuse(f"its shard has no image {image_name}")
        other = self._name_of.setdefault(suffix, image_name)
        if other != image_name:
            raise self._refuse(f"its shard has one image for {other} and {image_name}, not two")
        return self.members[suffix]

    def _find_suffix(self, image_name: str) -> str:
        """Return the suffix of the member that a name means, "" for none."""
        base = image_name.replace("\\", "/").rpartition("/")[2].lower()
        own_suffix = base.removeprefix(f"{self.stem.lower()}.")
        if own_suffix in self.members:
            return own_suffix
        suffix, extension = base.partition(".")[2], base.rpartition(".")[2]
        if "." in suffix and suffix in self.members:
            return suffix
        of_extension = [one for one in self.image_suffixes if one.rpartition(".")[2] == extension]
        return extension if of_extension == [extension] else ""

    def _refuse(self, problem: str) -> BadSample:
        known = ", ".join(f"{self.stem}.{suffix}" for suffix in self.image_suffixes)
        return BadSample(self.sample_name, f"{problem} (its images: {known or 'none'})")


def is_image_member(suffix: str) -> bool:
    """Tell whether a member with that suffix is an image."""
    return suffix.rpartition(".")[2] in IMAGE_EXTENSIONS
