"""WebDataset shards: tar files whose samples are reached by number, through an index beside each.

    FOLDER/
        shards.json        the shards in order, with their numbers of samples
        000000.tar         KEY.json (a record of LLaVA's), KEY.0.jpg, KEY.1.jpg ...
        000000.tar.index   what the tar file holds: a line of JSON per sample

`pack` writes them. Other tar files of the WebDataset kind (KEY.jpg and KEY.txt or KEY.json) are
read as well: an index is made of them once, which takes reading them. The folder may be a URL: a
sample is then read with a request for its bytes alone.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand
from PIL import Image

from vlbench.data.images import open_bytes
from vlbench.data.lanes import Lanes
from vlbench.data.record import TURNS, sample_of_record
from vlbench.data.remote import exists, is_url, json_of, piece
from vlbench.data.sample import Sample
from vlbench.data.shard_index import Entry, index_of
from vlbench.mistakes import BadSample, Mistake

LIST = "shards.json"
OPEN = 64  # indexes that are kept in memory: of about as many shards as are read in turn
TRIES, PAUSE = 3, 1.0  # how often a shard that cannot be read is tried, and seconds in between
CAPTION = ("txt", "caption", "text")  # members that hold the answer of a picture without a record


@dataclass(frozen=True)
class Member:
    """A picture inside a tar file."""

    tar: str
    file: str
    """Its name in the tar file."""
    offset: int
    size: int

    @property
    def name(self) -> str:
        """Name shard and file."""
        return f"{self.tar}: {self.file}"

    def open(self) -> Image.Image:
        """Return it in RGB, or raise a Mistake that names shard and file."""
        return open_bytes(read_at(self.tar, self.offset, self.size), self.name)

    def drafted(self, side: int) -> Image.Image:
        """Return it in RGB; a JPEG may be decoded smaller, its longest edge >= `side`."""
        return open_bytes(read_at(self.tar, self.offset, self.size), self.name, side)


class Shards:
    """The samples of shards as a source: a folder with shards.json, or a pattern of tar files."""

    def __init__(self, where: str | Path) -> None:
        """Find the shards: `where` is a folder that `pack` wrote, or `dir/{000000..000123}.tar`.

        Both may be URLs.
        """
        self.name = str(where)
        self.tars, self.counts = _listed(self.name)
        self._ends = np.cumsum(self.counts)
        self._orders: dict[str, Lanes] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def order(self, key: str) -> Lanes:
        """Return the order of a pass over the samples, which reads shards in turn."""
        if key not in self._orders:
            self._orders = {key: Lanes(self.counts, key)}
        return self._orders[key]

    def __getitem__(self, index: int) -> Sample:
        """Return sample `index` (from 0), or raise BadSample."""
        shard = int(self._ends.searchsorted(index, side="right"))
        tar = self.tars[shard]
        place = index - (int(self._ends[shard - 1]) if shard else 0)
        try:
            entries = _entries(tar)
            entry = entries[place]
        except Mistake as mistake:
            raise BadSample(f"{Path(tar).name} {place}", str(mistake)) from mistake
        except IndexError:
            what = f"{tar} has {len(entries)} samples, and {LIST} says {self.counts[shard]}"
            raise BadSample(f"{Path(tar).name} {place}", what) from None
        return _sample(tar, entry)


@functools.lru_cache(maxsize=OPEN)
def _entries(tar: str) -> list[Entry]:
    """Return what a tar file holds; one that cannot be read now is tried again."""
    for _ in range(TRIES - 1):
        try:
            return index_of(tar)
        except Mistake:
            time.sleep(PAUSE)
    return index_of(tar)


def _listed(where: str) -> tuple[list[str], list[int]]:
    """Return the tar files and their numbers of samples."""
    beside = f"{where.rstrip('/')}/{LIST}"
    if not where.endswith(".tar") and exists(beside):
        told = json_of(beside)
        shards = told.get("shards") if isinstance(told, dict) else None
        if not isinstance(shards, list) or not all(_is_shard(one) for one in shards) or not shards:
            raise Mistake(f"{beside}: is not a list of shards with file and samples")
        files = [beside.removesuffix(LIST) + one["file"] for one in shards]
        return files, [one["samples"] for one in shards]
    if not where.endswith(".tar"):
        raise Mistake(
            f"data {where}: holds no {LIST}; give a folder that `pack` wrote, or tar files as "
            "dir/{000000..000123}.tar"
        )
    tars = list(braceexpand(where))
    missing = [tar for tar in tars if not exists(tar)]
    if missing:
        raise Mistake(f"data {where}: there is no {missing[0]} ({len(missing)} are missing)")
    return tars, [len(index_of(tar)) for tar in tars]


def _is_shard(one: Any) -> bool:
    return isinstance(one, dict) and isinstance(one.get("file"), str) and one.get("samples", 0) > 0


def _sample(tar: str, entry: Entry) -> Sample:
    """Make the sample of an entry: a record of LLaVA's, or a picture and its caption."""
    members = entry.members
    name = f"{Path(tar).name}/{entry.key}"
    try:
        if "json" in members:
            record = json.loads(read_at(tar, *members["json"]))
        else:
            record = {}
    except (ValueError, Mistake) as error:
        raise BadSample(name, f"its json cannot be read ({error})") from error
    if not isinstance(record, dict):
        raise BadSample(name, "its json is no mapping")
    pictures = {kind: Member(tar, f"{entry.key}.{kind}", *at) for kind, at in members.items()}
    if not any(key in record for key in TURNS):
        record = {"id": entry.key, "conversations": list(_captioned(tar, entry, record))}
        record["image"] = [kind for kind in members if kind.split(".")[-1] in PICTURES][:1]
    return sample_of_record(record, name, lambda file: _member(pictures, file, name))


PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2", "avif")


def _member(pictures: dict[str, Member], file: str, name: str) -> Member:
    kind = file.split(".", 1)[-1] if file not in pictures else file
    if kind not in pictures:
        raise BadSample(name, f"its shard has no picture {file}")
    return pictures[kind]


def _captioned(tar: str, entry: Entry, record: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Give the turns of a picture with a caption: of a text member, or a key of its json."""
    texts = [record[kind] for kind in CAPTION if isinstance(record.get(kind), str)]
    for kind in CAPTION:
        if kind in entry.members:
            texts.append(read_at(tar, *entry.members[kind]).decode("utf-8", "replace"))
    yield {"from": "human", "value": "<image>"}
    yield {"from": "gpt", "value": texts[0].strip() if texts else ""}


@functools.lru_cache(maxsize=1 << 16)
def _trouble(tar: str) -> str:
    """Say why a shard cannot be opened, "" if it can; asked once, and then again a few times."""
    for number in range(TRIES):
        try:
            if is_url(tar):
                piece(tar, 0, 1)
                return ""
            with open(tar, "rb"):
                return ""
        except OSError as error:
            problem = f"cannot be opened in {TRIES} tries ({error.strerror})"
        except Mistake as mistake:
            problem = f"{str(mistake).removeprefix(f'{tar}: ')}, tried {TRIES} times"
        if number < TRIES - 1:
            time.sleep(PAUSE)
    return problem


def read_at(tar: str, offset: int, size: int) -> bytes:
    """Return `size` bytes of a file from `offset` on; a Mistake where they are not there."""
    problem = _trouble(tar)
    if problem:
        raise Mistake(f"{tar}: {problem}")
    try:
        if is_url(tar):
            data = piece(tar, offset, size)
        else:
            with open(tar, "rb") as file:
                file.seek(offset)
                data = file.read(size)
    except OSError as error:
        raise Mistake(f"{tar}: cannot be read ({error.strerror})") from error
    if len(data) < size:
        raise Mistake(f"{tar}: is torn, it ends before byte {offset + size}")
    return data
