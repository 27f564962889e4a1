"""The index beside a shard: where in the tar file each sample's members are."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlbench.data.remote import exists, is_url, piece
from vlbench.files import read_text
from vlbench.mistakes import Mistake


@dataclass(frozen=True)
class Entry:
    """A sample of a shard."""

    key: str
    members: dict[str, tuple[int, int]]
    """Offset and size in bytes by extension: json, 0.jpg, txt ..."""


def beside(tar: str) -> str:
    """Return the file of a shard's index."""
    return f"{tar}.index"


def index_of(tar: str) -> list[Entry]:
    """Return the index of a shard; where there is none, the tar file is read to make it.

    It is written beside the shard if that can be written. Raises a Mistake for a shard that is
    missing or torn, and for a URL without an index, which would have to be read whole.
    """
    if is_url(tar):
        if not exists(beside(tar)):
            raise Mistake(f"{tar}: has no {beside(tar)}, which shards by URL need: pack writes it")
        return list(_parsed(beside(tar), piece(beside(tar)).decode("utf-8", "replace")))
    file = Path(beside(tar))
    if file.is_file():
        return list(_parsed(str(file), read_text(file)))
    entries = list(scanned(tar))
    own = file.with_name(f"{file.name}.{os.getpid()}")  # others may make it at the same time
    try:
        own.write_text(text(entries), encoding="utf-8")
        os.replace(own, file)
    except OSError:
        return entries  # the folder cannot be written: every process makes it for itself
    return entries


def text(entries: list[Entry]) -> str:
    """Return an index as it stands in a file: a line of JSON per sample."""
    return "".join(
        json.dumps([entry.key, entry.members], ensure_ascii=False) + "\n" for entry in entries
    )


def _parsed(file: str, content: str) -> Iterator[Entry]:
    for number, line in enumerate(content.splitlines(), 1):
        try:
            key, members = json.loads(line)
            yield Entry(key, {kind: (int(at), int(size)) for kind, (at, size) in members.items()})
        except (ValueError, TypeError, AttributeError) as error:
            raise Mistake(f"{file}: line {number} is not of an index ({error})") from error


def scanned(tar: str) -> Iterator[Entry]:
    """Read a tar file and give its samples: members whose names are alike up to the first dot."""
    key, members = "", dict[str, tuple[int, int]]()
    try:
        with tarfile.open(tar, "r:") as file:
            for member in file:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, kind = name.partition(".")
                whole = f"{folder}/{stem}" if folder else stem
                if whole != key and members:
                    yield Entry(key, members)
                    members = {}
                key = whole
                members[kind] = (member.offset_data, member.size)
    except FileNotFoundError as error:
        raise Mistake(f"{tar}: does not exist") from error
    except (OSError, tarfile.TarError) as error:
        raise Mistake(f"{tar}: is torn or no tar file ({error})") from error
    if members:
        yield Entry(key, members)
