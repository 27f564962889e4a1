"""Tiled images are the same from every kind of source, and their sizes are read from beginnings."""

from __future__ import annotations

import base64
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from asked_conversations import build_asked_vlm
from asked_conversations import noise as noise_of
from PIL import Image
from test_record_dialects import IMAGE_STRUCT
from test_view_layout import SIDE, encoder, layout

from vlbench.data import image_size
from vlbench.data.conversation_files import ConversationFiles
from vlbench.data.image_processing import ImageFile, ImageTransform, blank_image
from vlbench.data.image_size import HEADER_BYTES, read_image_size
from vlbench.data.packing import collate
from vlbench.data.sample import Sample, SampleSource
from vlbench.data.shards import WebDatasetShards
from vlbench.evaluate.attention_diagnostics import diagnose_answers
from vlbench.evaluate.heldout_questions import EvalQuestion
from vlbench.processor import InMemoryImage, sample_from_messages
from vlbench.serve.heat_map import compute_heat_map

SIZES = ((600, 200), (50, 40), (300, 500))  # the first and the last have more than HEADER_BYTES
TURNS = [
    {"from": "human", "value": "<image><image>\n<image>\nWhat?"},
    {"from": "gpt", "value": "It is red."},
]
GIVEN = layout(4)
TRANSFORM = ImageTransform(
    SIDE, SIDE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), tiling=GIVEN.settings.tiling
)


def noise(size: tuple[int, int], kind: str = "PNG") -> bytes:
    levels = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(levels).save(stream, kind)
    return stream.getvalue()


PICTURES = [noise(size) for size in SIZES]


def in_files(folder: Path) -> SampleSource:
    for number, data in enumerate(PICTURES):
        (folder / f"{number}.png").write_bytes(data)
    record = {"id": "a", "image": ["0.png", "1.png", "2.png"], "conversations": TURNS}
    (folder / "data.json").write_text(json.dumps([record]))
    return ConversationFiles(folder / "data.json")


def in_tar(folder: Path) -> SampleSource:
    members = {f"a.{number}.png": data for number, data in enumerate(PICTURES)}
    members["a.json"] = json.dumps({"conversations": TURNS}).encode()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return WebDatasetShards(folder / "0.tar")


def in_parquet(folder: Path) -> SampleSource:
    images = [{"bytes": data, "path": None} for data in PICTURES]
    columns = {
        "images": pa.array([images], pa.list_(IMAGE_STRUCT)),
        "conversations": pa.array([TURNS]),
    }
    pq.write_table(pa.table(columns), folder / "a.parquet")
    return ConversationFiles(folder / "a.parquet")


def in_json(folder: Path, write: Callable[[bytes], str]) -> SampleSource:
    record = {"images": [*map(write, PICTURES)], "conversations": TURNS}
    (folder / "data.json").write_text(json.dumps([record]))
    return ConversationFiles(folder / "data.json")


def to_digits(data: bytes) -> str:
    return base64.b64encode(data).decode()


SOURCES: dict[str, Callable[[Path], SampleSource]] = {
    "files": in_files,
    "tar": in_tar,
    "parquet": in_parquet,
    "json": lambda folder: in_json(folder, to_digits),
    "json, lines": lambda folder: in_json(folder, lambda d: base64.encodebytes(d).decode()),
    "json, data URLs": lambda folder: in_json(
        folder, lambda data: f"data:image/png;base64,{to_digits(data)}"
    ),
}


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> SampleSource:
    return SOURCES[request.param](tmp_path)


def test_a_sample_is_the_same_from_every_source(source):
    found = encoder(GIVEN).encode(source[0])
    images = tuple(InMemoryImage(Image.open(io.BytesIO(data))) for data in PICTURES)
    expected = encoder(GIVEN).encode(replace(found.sample, images=images))
    batch, wanted = (collate([[one]], TRANSFORM.load_levels) for one in (found, expected))
    assert len(set(wanted.list_view_bounds())) == 4 < len(wanted.pixels)
    for name in ("input_ids", "visual_index", "view_bounds", "pixels"):
        assert torch.equal(getattr(batch, name), getattr(wanted, name)), name


def test_sizes_are_read_from_beginnings_and_a_record_once_for_all(source, monkeypatch):
    lengths: list[int] = []
    read_header = image_size.read_header_size

    def spy(opened: Any, name: str, exif: bool) -> tuple[int, int]:
        size = read_header(opened, name, exif)
        is_file = not isinstance(opened, io.BytesIO)
        lengths.append(opened.tell() if is_file else opened.getbuffer().nbytes)
        return size

    records: list[bool] = []
    read_record = ConversationFiles.read_record

    def count(self: ConversationFiles, index: int, with_images: bool = False) -> Any:
        records.append(with_images)
        return read_record(self, index, with_images)

    monkeypatch.setattr(image_size, "read_header_size", spy)
    monkeypatch.setattr(ConversationFiles, "read_record", count)
    encoded = encoder(GIVEN).encode(source[0])
    assert len(lengths) == 3 and max(map(len, PICTURES)) > HEADER_BYTES >= max(lengths)
    for image in encoded.sample.images:
        TRANSFORM.load_levels(image)
    assert records.count(True) <= 1
    copy = pickle.loads(pickle.dumps(source))
    assert getattr(copy, "_latest_images", None) is None
    assert encoder(GIVEN).encode(copy[0]).visual_index == encoded.visual_index


def test_a_longer_header_is_read_in_full(tmp_path):
    data = noise((90, 60), "JPEG")
    comment = b"\xff\xfe" + (60_002).to_bytes(2, "big") + bytes(60_000)
    data = data[:2] + 2 * comment + data[2:]
    text = base64.b64encode(data).decode()
    turns = [{"from": "human", "value": "<image>What?"}, TURNS[1]]
    (tmp_path / "data.json").write_text(json.dumps([{"image": text, "conversations": turns}]))
    [image] = ConversationFiles(tmp_path / "data.json")[0].images
    assert read_image_size(image) == (90, 60) == image.open().size


def test_a_heat_map_asks_for_the_size_of_each_picture_once(tmp_path, monkeypatch):
    vlm, asked = build_asked_vlm("tiled flamingo"), []
    read_size = ImageFile.read_size
    monkeypatch.setattr(
        ImageFile, "read_size", lambda self, exif: asked.append(self) or read_size(self, exif)
    )
    parts: list[dict[str, Any]] = []
    for number in range(3):
        noise_of(number).open().save(tmp_path / f"{number}.png")
        parts.append({"type": "image", "image": tmp_path / f"{number}.png"})
    chat = [{"role": "user", "content": [*parts, {"type": "text", "text": "what?"}]}]
    for image in (0, 2):
        asked.clear()
        compute_heat_map(vlm, chat, "it is", image)
        assert len(asked) == len(set(asked)) == 3
    question = EvalQuestion(sample_from_messages(chat), "a", "", "en")
    asked.clear()
    assert diagnose_answers(vlm, [(question, "b")])["maps"]
    assert len(asked) == len(set(asked)) == 3


def test_a_blank_picture_is_tiled_as_the_picture_that_it_replaces(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (120, 30)).save(tmp_path / "a.jpg", exif=exif.tobytes())
    picture = ImageFile(tmp_path / "a.jpg")
    for turned in (False, True):
        given = replace(GIVEN, exif=turned)
        transform = replace(TRANSFORM, exif=turned)
        sample = Sample("a", (), (picture, blank_image(picture, TRANSFORM.mean)))
        seen, blank = given.tile_sample(sample).images
        assert (seen.grid, seen.size) == (blank.grid, blank.size)
        assert len(transform.load_levels(blank)) == len(transform.load_levels(seen))
