"""WebDataset shards: tar files whose samples are reached by number, through an index beside each.

    FOLDER/
        shards.json        the shards in order, with their numbers of samples
        000000.tar         KEY.json (a record of LLaVA's), KEY.0.jpg, KEY.1.jpg ...
        000000.tar.index   what the tar file holds: see shard_index

`pack` writes them. Other tar files of the WebDataset kind (KEY.jpg and KEY.txt or KEY.json) are
read as well: an index is made of them once, which takes reading their headers. The folder may be a
URL: a sample is then read with a request for its bytes alone.
"""

from __future__ import annotations

import functools
import json
import time
import zlib
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand
from PIL import Image

from vlbench.data.images import open_bytes
from vlbench.data.lanes import Lanes
from vlbench.data.record import IMAGES, TURNS, sample_of_record
from vlbench.data.remote import exists, is_url, json_of, piece
from vlbench.data.sample import Sample
from vlbench.data.shard_index import Stamp, beside, index_of, stamp, summary_of
from vlbench.data.shard_scan import (
    BLOCK,
    CAPTION,
    PICTURES,
    Entry,
    Scan,
)
from vlbench.mistakes import BadSample, Mistake

LIST = "shards.json"
OPEN = 64  # indexes that are kept in memory: of about as many shards as are read in turn
TRIES, PAUSE = 3, 1.0  # how often a shard that cannot be read is tried, and seconds in between


@dataclass(frozen=True)
class Member:
    """A picture inside a tar file."""

    tar: str
    file: str
    """Its name in the tar file."""
    offset: int
    size: int
    crc: int | None = None
    """Of its header, see `Place`."""

    @property
    def name(self) -> str:
        """Name shard and file."""
        return f"{self.tar}: {self.file}"

    def open(self) -> Image.Image:
        """Return it in RGB, or raise a Mistake that names shard and file."""
        return open_bytes(self._bytes(), self.name)

    def drafted(self, side: int) -> Image.Image:
        """Return it in RGB; a JPEG may be decoded smaller, its longest edge >= `side`."""
        return open_bytes(self._bytes(), self.name, side)

    def _bytes(self) -> bytes:
        return read_at(self.tar, self.offset, self.size, self.crc)


class Shards:
    """The samples of shards as a source: a folder with shards.json, or a pattern of tar files."""

    def __init__(self, where: str | Path) -> None:
        """Find the shards: `where` is a folder that `pack` wrote, or `dir/{000000..000123}.tar`.

        Both may be URLs. `notes` says what is left out of tar files that are in no list, a line
        for each kind of it.
        """
        self.name = str(where)
        self.notes: list[str] = []
        self._torn: list[BadSample] = []
        listed = _listed(self.name)
        self.tars, self.counts = listed or self._matching()
        self._ends = np.cumsum(self.counts)
        self._orders: dict[str, Lanes] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def torn(self) -> list[BadSample]:
        """Return a bad sample for each tar file in no list that was not read to its end."""
        return self._torn

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
        name = f"{Path(tar).name} {place}"
        problem = _trouble(tar)
        if problem:
            raise BadSample(name, f"{tar}: {problem}")
        try:
            found = _entries(tar, stamp(tar))
        except Mistake as mistake:
            raise BadSample(name, str(mistake)) from mistake
        if place < len(found.entries):
            return _sample(tar, found.entries[place])
        said = "it had when it was opened" if is_tar(self.name) else f"{LIST} says"
        told = f"{tar} has {len(found.entries)} samples, and {said} {self.counts[shard]}"
        raise BadSample(name, f"{tar}: {found.fault}" if found.fault else told)

    def _matching(self) -> tuple[list[str], list[int]]:
        """Return the tar files of a pattern and their numbers of samples, and note their faults."""
        tars, counts = _expanded(self.name), []
        left_out: Counter[str] = Counter()
        for tar in tars:
            count, some, fault = summary_of(tar)
            counts.append(count)
            left_out += some
            if fault:
                bad = BadSample(f"{Path(tar).name} {count - 1}", f"{tar}: {fault}")
                self._torn.append(bad.at(self.name, sum(counts)))  # its last sample
        if not sum(counts):
            other = f"; it holds {_counted(left_out)}" if left_out else ""
            raise Mistake(f"data {self.name}: holds no samples (KEY.jpg, KEY.txt, KEY.json){other}")
        self.notes += [f"left out: {count} {what}" for what, count in left_out.items()]
        return tars, counts


def _counted(left_out: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in left_out.items())


@functools.lru_cache(maxsize=OPEN)
def _entries(tar: str, of: Stamp | None) -> Scan:
    """Return what a tar file holds, `of` that stamp; one that cannot be read is tried again."""
    for _ in range(TRIES - 1):
        try:
            return index_of(tar)
        except Mistake:
            time.sleep(PAUSE)
    return index_of(tar)


def is_tar(name: str) -> bool:
    """Tell whether a file's name is that of a tar file, one that is compressed included."""
    return name.lower().endswith((".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"))


def _listed(where: str) -> tuple[list[str], list[int]] | None:
    """Return the tar files of a folder's list and their numbers of samples; None for tar files."""
    if is_tar(where):
        return None
    file = f"{where.rstrip('/')}/{LIST}"
    if not exists(file):
        raise Mistake(
            f"data {where}: holds no {LIST}; give a folder that `pack` wrote, or tar files as "
            "dir/{000000..000123}.tar"
        )
    told = json_of(file)
    shards = told.get("shards") if isinstance(told, dict) else None
    if not isinstance(shards, list) or not all(_is_shard(one) for one in shards) or not shards:
        raise Mistake(f"{file}: is not a list of shards with file and samples")
    files = [file.removesuffix(LIST) + one["file"] for one in shards]
    return files, [one["samples"] for one in shards]


def _expanded(pattern: str) -> list[str]:
    """Return the tar files of a pattern, which are all there."""
    try:
        tars = list(braceexpand(pattern))
    except ValueError:  # UnbalancedBracesError
        what = "a brace without its other one; expected dir/{000000..000123}.tar"
        raise Mistake(f"data {pattern}: {what}") from None
    missing = [tar for tar in tars if not exists(tar)]
    if missing:
        raise Mistake(f"data {pattern}: there is no {missing[0]} ({len(missing)} are missing)")
    return tars


def _is_shard(one: Any) -> bool:
    return isinstance(one, dict) and isinstance(one.get("file"), str) and one.get("samples", 0) > 0


def _sample(tar: str, entry: Entry) -> Sample:
    """Make the sample of an entry: a record of LLaVA's, or a picture and its caption."""
    members = entry.members
    name = f"{Path(tar).name}/{entry.key}"
    try:
        record = json.loads(read_at(tar, *members["json"])) if "json" in members else {}
    except Mistake as mistake:
        raise BadSample(name, str(mistake)) from mistake
    except (ValueError, RecursionError) as error:
        raise BadSample(name, f"its json cannot be read ({error})") from error
    if not isinstance(record, dict):
        raise BadSample(name, "its json is no mapping")
    kinds = sorted((kind for kind in members if _is_picture(kind)), key=_numbered)
    texts = [kind for kind in CAPTION if kind in members]
    if not any(key in record for key in TURNS):
        others = {key: value for key, value in record.items() if key not in (*CAPTION, *IMAGES)}
        turns, texts = _captioned(name, tar, entry, record, kinds)
        record = {**others, "id": entry.key, "conversations": turns}
    if not _names_pictures(record):  # pictures of a key are its own
        record = {key: value for key, value in record.items() if key not in IMAGES}
        record |= {"image": kinds} if kinds else {}
    pictures = {kind: Member(tar, f"{entry.key}.{kind}", *at) for kind, at in members.items()}
    sample = sample_of_record(record, name, lambda file: _member(pictures, file, name))
    shown = {picture.name for picture in sample.pictures}
    unread = [kind for kind in kinds if pictures[kind].name not in shown] + texts
    return replace(sample, unread=(*sample.unread, *unread))


def _names_pictures(record: dict[str, Any]) -> bool:
    """Tell whether a record says itself which pictures it has, in a key or in parts of a turn."""
    turns = record.get("messages")
    parts = turns if isinstance(turns, list) else []
    return any(record.get(key) for key in IMAGES) or any(
        isinstance(turn, dict) and isinstance(turn.get("content"), list) for turn in parts
    )


def _is_picture(kind: str) -> bool:
    return kind.split(".")[-1] in PICTURES


def _numbered(kind: str) -> str:
    """Return what sorts 2.jpg before 10.jpg."""
    number, _, rest = kind.partition(".")
    return f"{number:0>9}.{rest}"


def _member(pictures: dict[str, Member], file: str, name: str) -> Member:
    """Return the picture that a record calls `file`: KEY.jpg, jpg or with any folders before it."""
    base = file.replace("\\", "/").rpartition("/")[2].lower()
    for kind in (base, base.partition(".")[2], base.rpartition(".")[2]):
        if kind in pictures:
            return pictures[kind]
    has = ", ".join(one.file for kind, one in pictures.items() if _is_picture(kind)) or "none"
    raise BadSample(name, f"its shard has no picture {file} (its pictures: {has})")


def _captioned(
    name: str, tar: str, entry: Entry, record: dict[str, Any], kinds: list[str]
) -> tuple[list[dict[str, str]], list[str]]:
    """Return the turns of a picture with a caption: of a key of its json, or a text member.

    The second is where other texts are that are not the caption.
    """
    if len(kinds) != 1:
        what = f"has {len(kinds)} pictures ({', '.join(kinds)})" if kinds else "has no picture"
        raise BadSample(name, f"{what}; a caption belongs to one (members: {_few(entry.members)})")
    texts = [(kind, record[kind]) for kind in CAPTION if isinstance(record.get(kind), str)]
    try:
        for kind in CAPTION:
            if kind in entry.members:
                texts.append((kind, read_at(tar, *entry.members[kind]).decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        what = f"its {kind} is not UTF-8 text (byte {error.start + 1})"
        raise BadSample(name, what) from error
    except Mistake as mistake:
        raise BadSample(name, str(mistake)) from mistake
    caption = next((text.strip() for _, text in texts if text.strip()), "")
    if not caption:
        raise BadSample(name, _no_text(entry, record, bool(texts)))
    other = [kind for kind, text in texts if text.strip() not in ("", caption)]
    return [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}], other


def _no_text(entry: Entry, record: dict[str, Any], empty: bool) -> str:
    """Say why a picture has no caption."""
    if empty:
        return "its text is empty"
    said = f"; keys of its json: {_few(record)}" if "json" in entry.members else ""
    return (
        f"has no text: expected a member .txt, .caption or .text, or a json with a key of that "
        f"name or with conversations (members: {_few(entry.members)}{said})"
    )


def _few(names: Collection[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(list(names)[:8]) + more


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


def read_at(tar: str, offset: int, size: int, crc: int | None = None) -> bytes:
    """Return `size` bytes of a member from `offset` on; a Mistake where they are not there.

    With `crc` the header before them must have that checksum.
    """
    head = BLOCK if crc is not None else 0
    data = _piece(tar, offset - head, size + head)
    if len(data) < size + head:
        raise Mistake(f"{tar}: is torn, it ends before byte {offset + size}")
    if crc is not None and zlib.crc32(data[:head]) != crc:
        help_ = "make it anew" if is_url(tar) else "remove it, and it is made anew"
        raise Mistake(
            f"{tar}: is another file than {beside(tar)} was made of (byte {offset - head}): {help_}"
        )
    return data[head:]


def _piece(tar: str, offset: int, size: int) -> bytes:
    problem = _trouble(tar)
    if problem:
        raise Mistake(f"{tar}: {problem}")
    try:
        if is_url(tar):
            return piece(tar, offset, size)
        with open(tar, "rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise Mistake(f"{tar}: cannot be read ({error.strerror})") from error
