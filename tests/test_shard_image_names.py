"""Names of images in the records of shards: which member they mean, and never one for two."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlbench.data.sample import Sample
from vlbench.data.shards import WebDatasetShards
from vlbench.errors import BadSample


def only_sample(folder: Path, images: list[str], names: Any) -> Sample:
    """Return the sample of a shard with those members of key 000, whose record has those names."""
    count = len(names) if isinstance(names, list) else 1
    turns = [
        {"from": "human", "value": "<image>" * count + "\nCompare."},
        {"from": "gpt", "value": "They differ."},
    ]
    file = folder / "x.tar"
    with tarfile.open(file, "w") as tar:
        members = {"part/000.json": json.dumps({"image": names, "conversations": turns}).encode()}
        for number, suffix in enumerate(images):
            data = io.BytesIO()
            kind = {"jpg": "JPEG", "png": "PNG"}[suffix.rpartition(".")[2]]
            Image.new("RGB", (8 + number, 8)).save(data, kind)
            members[f"part/000.{suffix}"] = data.getvalue()
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return WebDatasetShards(file)[0]


@pytest.mark.parametrize(
    ("images", "names", "found"),
    [
        (["jpg"], "coco/train2017/0001.jpg", ["jpg"]),  # its name before it was packed
        (["jpg"], "000.jpg", ["jpg"]),
        (["jpg"], "somewhere\\000.JPG", ["jpg"]),
        (["jpg"], "jpg", ["jpg"]),
        (["jpg"], ["000.jpg", "000.jpg"], ["jpg", "jpg"]),  # shown twice
        (["jpg", "png"], "coco/0001.jpg", ["jpg"]),  # beside a mask
        (["0.jpg", "1.jpg"], ["1.jpg", "0.jpg"], ["1.jpg", "0.jpg"]),
        (["0.jpg", "1.jpg"], ["old.0.jpg", "old.1.jpg"], ["0.jpg", "1.jpg"]),
        (["left.jpg", "right.jpg"], ["000.right.jpg", "a/left.jpg"], ["right.jpg", "left.jpg"]),
    ],
)
def test_a_name_means_the_image_of_its_key(images, names, found, tmp_path):
    sample = only_sample(tmp_path, images, names)
    assert [image.name.rpartition("/")[2] for image in sample.images] == [
        f"000.{suffix}" for suffix in found
    ]


@pytest.mark.parametrize(
    ("images", "names", "reason"),
    [
        (["jpg"], ["a.jpg", "b.jpg"], "one image for a.jpg and b.jpg, not two"),
        (["jpg"], ["a.jpg", "000.jpg"], "one image for a.jpg and 000.jpg, not two"),
        (["jpg"], ["a/000.jpg", "b/000.jpg"], "one image for a/000.jpg and b/000.jpg, not two"),
        (["0.jpg"], ["a.0.jpg", "b.0.jpg"], "one image for a.0.jpg and b.0.jpg, not two"),
        (["jpg", "0.jpg"], "other.jpg", "no image other.jpg (its images: 000.jpg, 000.0.jpg)"),
        (["jpg"], "other.png", "no image other.png (its images: 000.jpg)"),
        ([], "000.jpg", "no image 000.jpg (its images: none)"),
    ],
)
def test_two_names_never_mean_one_image(images, names, reason, tmp_path):
    with pytest.raises(BadSample) as bad:
        only_sample(tmp_path, images, names)
    assert reason in bad.value.reason
