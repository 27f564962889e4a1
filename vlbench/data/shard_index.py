"""The index beside a shard: where in the tar file each sample's members are.

    {"version": 2, "size": 20480, "mtime": 1767225600000000000, "samples": 2, ...}
    ["000000", {"jpg": [512, 938, 2774180132], "txt": [2048, 17, 1180436577]}]
    ["000001", {"jpg": [3072, 911, 3012208867], "txt": [4608, 21, 201143301]}]

The first line says which file was indexed (size in bytes, time of modification in ns; null in what
`pack` wrote, as shards are copied), whether it was whole, and what was left out of it. An index
that does not fit its tar file is made anew. Each member has offset, size and the CRC-32 of its
header, by which a reader notices that the file is another one.
"""

from __future__ import annotations

import json
import os
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

from vlbench.data.remote import exists, is_url, length_of, piece
from vlbench.data.shard_scan import Entry, Scan, scan
from vlbench.files import json_lines, lines_of
from vlbench.mistakes import Mistake

VERSION = 2
Stamp = tuple[int, int | None]
"""Size in bytes, and time of modification in ns or None for any."""


def beside(tar: str) -> str:
    """Return the file of a shard's index."""
    return f"{tar}.index"


def stamp(tar: str) -> Stamp | None:
    """Return what tells a tar file from the one before it; None for a URL or a missing file."""
    if is_url(tar):
        return None
    try:
        found = os.stat(tar)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def index_of(tar: str) -> Scan:
    """Return the index of a shard; where none fits, the tar file is read to make it.

    It is written beside the shard if that can be written. Raises a Mistake for a shard that is
    missing or no tar file, and for a URL without an index, which would have to be read whole.
    """
    if is_url(tar):
        return _remote(tar)
    try:
        with open(beside(tar), encoding="utf-8", newline="\n") as file:
            about = _about(file.readline())
            if _fits(about, tar):
                return _parsed(about, file.read())
    except (OSError, ValueError):  # there is none, or it was cut short
        pass
    return _made(tar)


def summary_of(tar: str) -> tuple[int, Counter[str], str]:
    """Return a shard's number of samples, what is left out and its fault.

    Of an index that fits only the first line is read.
    """
    if not is_url(tar):
        try:
            with open(beside(tar), encoding="utf-8", newline="\n") as file:
                about = _about(file.readline())
            if _fits(about, tar):
                fault = about["fault"]
                return about["samples"] + bool(fault), Counter(about["left_out"]), fault
        except (OSError, ValueError):
            pass
    found = index_of(tar)
    return len(found), found.left_out, found.fault


def text(found: Scan, of: Stamp) -> str:
    """Return an index as it stands in a file: a line about the tar file, a line per sample."""
    about = {
        "version": VERSION,
        "size": of[0],
        "mtime": of[1],
        "samples": len(found.entries),
        "fault": found.fault,
        "left_out": found.left_out,
    }
    return json_lines((about, *([entry.key, entry.members] for entry in found.entries)))


def _made(tar: str) -> Scan:
    """Read a tar file, and keep the index beside it."""
    of = stamp(tar)  # taken before: what changes while it is read is read again next time
    found = scan(tar)
    file = Path(beside(tar))
    own = file.with_name(f".{file.name}.{uuid.uuid4().hex}")  # others may make it at the same time
    if of is None:  # it came just now
        return found
    try:
        own.write_text(text(found, of), encoding="utf-8", newline="\n")
        os.replace(own, file)
    except OSError:  # the folder cannot be written: every process makes it for itself
        own.unlink(missing_ok=True)
    return found


def _about(line: str) -> dict[str, Any]:
    """Return the first line of an index; ValueError for that of another version."""
    about = json.loads(line)
    if not isinstance(about, dict) or about.get("version") != VERSION:
        raise ValueError("is not of this version")
    return about


def _fits(about: dict[str, Any], tar: str) -> bool:
    """Tell whether an index was made of this very file; one that is missing is not judged."""
    now = stamp(tar)
    return now is None or (about["size"], about["mtime"] or now[1]) == now


def _parsed(about: dict[str, Any], content: str) -> Scan:
    """Return what an index tells; ValueError where lines are missing."""
    entries = [_entry(line) for line in lines_of(content)]
    if len(entries) != about["samples"]:
        raise ValueError(f"has {len(entries)} of {about['samples']} samples")
    return Scan(entries, Counter(about["left_out"]), about["fault"])


def _entry(line: str) -> Entry:
    try:
        key, members = json.loads(line)
        return Entry(key, {kind: (*at, None)[:3] for kind, at in members.items()})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{line[:40]!r} is no line of an index") from error


def _remote(tar: str) -> Scan:
    """Return the index of a URL, which must be there; that of version 1 has no first line."""
    if not exists(beside(tar)):
        raise Mistake(f"{tar}: has no {beside(tar)}, which shards by URL need: pack writes it")
    first, _, rest = content = piece(beside(tar)).decode("utf-8", "replace").partition("\n")
    try:
        if first.startswith("["):
            return Scan([_entry(line) for line in lines_of("".join(content))])
        found, size = _parsed(about := _about(first), rest), length_of(tar)
    except ValueError as error:
        raise Mistake(f"{beside(tar)}: is not an index of shards ({error})") from error
    if size is not None and size > about["size"]:  # what is torn is named sample by sample
        raise Mistake(
            f"{tar}: has {size} bytes and its index is of one with {about['size']}: make the "
            "index anew, by reading a copy of the shard, or with pack"
        )
    return found
