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

from vlbench.data.remote_shards import file_exists, is_url, read_byte_range, remote_file_size
from vlbench.data.shard_scan import ShardEntry, TarScan, scan_tar
from vlbench.errors import UserError
from vlbench.text_files import format_json_lines, split_lines

INDEX_VERSION = 2
FileStamp = tuple[int, int | None]
"""Size in bytes, and time of modification in ns or None for any."""


def index_path(tar: str) -> str:
    """Return the file of a shard's index."""
    return f"{tar}.index"


def file_stamp(tar: str) -> FileStamp | None:
    """Return what tells a tar file from the one before it; None for a URL or a missing file."""
    if is_url(tar):
        return None
    try:
        found = os.stat(tar)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def load_shard_index(tar: str) -> TarScan:
    """Return the index of a shard; where none fits, the tar file is read to make it.

    It is written beside the shard if that can be written. Raises a Mistake for a shard that is
    missing or no tar file, and for a URL without an index, which would have to be read whole.
    """
    if is_url(tar):
        return _load_remote_index(tar)
    try:
        with open(index_path(tar), encoding="utf-8", newline="\n") as file:
            about = _parse_header(file.readline())
            if _matches_tar(about, tar):
                return _parse_index(about, file.read())
    except (OSError, ValueError):  # there is none, or it was cut short
        pass
    return _build_index(tar)


def load_shard_summary(tar: str) -> tuple[int, Counter[str], str]:
    """Return a shard's number of samples, what is left out and its fault.

    Of an index that fits only the first line is read.
    """
    if not is_url(tar):
        try:
            with open(index_path(tar), encoding="utf-8", newline="\n") as file:
                about = _parse_header(file.readline())
            if _matches_tar(about, tar):
                fault = about["fault"]
                return about["samples"] + bool(fault), Counter(about["left_out"]), fault
        except (OSError, ValueError):
            pass
    found = load_shard_index(tar)
    return len(found), found.left_out, found.fault


def format_index(tar_scan: TarScan, tar_stamp: FileStamp) -> str:
    """Return an index as it stands in a file: a line about the tar file, a line per sample."""
    about = {
        "version": INDEX_VERSION,
        "size": tar_stamp[0],
        "mtime": tar_stamp[1],
        "samples": len(tar_scan.entries),
        "fault": tar_scan.fault,
        "left_out": tar_scan.left_out,
    }
    return format_json_lines((about, *([entry.key, entry.members] for entry in tar_scan.entries)))


def _build_index(tar: str) -> TarScan:
    """Read a tar file, and keep the index beside it."""
    of = file_stamp(tar)  # taken before: what changes while it is read is read again next time
    found = scan_tar(tar)
    file = Path(index_path(tar))
    own = file.with_name(f".{file.name}.{uuid.uuid4().hex}")  # others may make it at the same time
    if of is None:  # it came just now
        return found
    try:
        own.write_text(format_index(found, of), encoding="utf-8", newline="\n")
        os.replace(own, file)
    except OSError:  # the folder cannot be written: every process makes it for itself
        own.unlink(missing_ok=True)
    return found


def _parse_header(line: str) -> dict[str, Any]:
    """Return the first line of an index; ValueError for that of another version."""
    about = json.loads(line)
    if not isinstance(about, dict) or about.get("version") != INDEX_VERSION:
        raise ValueError("is not of this version")
    return about


def _matches_tar(header: dict[str, Any], tar: str) -> bool:
    """Tell whether an index was made of this very file; one that is missing is not judged."""
    now = file_stamp(tar)
    return now is None or (header["size"], header["mtime"] or now[1]) == now


def _parse_index(header: dict[str, Any], content: str) -> TarScan:
    """Return what an index tells; ValueError where lines are missing."""
    entries = [_parse_entry(line) for line in split_lines(content)]
    if len(entries) != header["samples"]:
        raise ValueError(f"has {len(entries)} of {header['samples']} samples")
    return TarScan(entries, Counter(header["left_out"]), header["fault"])


def _parse_entry(line: str) -> ShardEntry:
    try:
        key, members = json.loads(line)
        return ShardEntry(key, {kind: (*at, None)[:3] for kind, at in members.items()})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{line[:40]!r} is no line of an index") from error


def _load_remote_index(tar: str) -> TarScan:
    """Return the index of a URL, which must be there; that of version 1 has no first line."""
    if not file_exists(index_path(tar)):
        raise UserError(
            f"{tar}: has no {index_path(tar)}, which shards by URL need: pack writes it"
        )
    first, _, rest = content = (
        read_byte_range(index_path(tar)).decode("utf-8", "replace").partition("\n")
    )
    try:
        if first.startswith("["):
            return TarScan([_parse_entry(line) for line in split_lines("".join(content))])
        found, size = _parse_index(about := _parse_header(first), rest), remote_file_size(tar)
    except ValueError as error:
        raise UserError(f"{index_path(tar)}: is not an index of shards ({error})") from error
    if size is not None and size > about["size"]:  # what is torn is named sample by sample
        raise UserError(
            f"{tar}: has {size} bytes and its index is of one with {about['size']}: make the "
            "index anew, by reading a copy of the shard, or with pack"
        )
    return found
