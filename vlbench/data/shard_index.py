"""What a shard holds: the tar file is scanned once, and an index of it is kept beside it.

    {"version": 2, "size": 20480, "mtime": 1767225600000000000, "samples": 2, ...}
    ["000000", {"jpg": [512, 938, 2774180132], "txt": [2048, 17, 1180436577]}]
    ["000001", {"jpg": [3072, 911, 3012208867], "txt": [4608, 21, 201143301]}]

The first line of an index says which file was indexed (size in bytes, time of modification in ns;
null in what `pack` wrote, as shards are copied), whether it was complete, and what was left out of
it. An index that does not match its tar file is rebuilt. Each member has its offset, its size and
the CRC-32 of its header, by which a reader notices that the tar file was replaced.
"""

from __future__ import annotations

import json
import os
import tarfile
import uuid
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from vlbench.data.remote_shards import file_exists, is_url, read_byte_range, remote_file_size
from vlbench.errors import UserError
from vlbench.text_files import format_json_lines, refuse_lfs_pointer, split_lines

INDEX_VERSION = 2
FileStamp = tuple[int, int | None]
"""Size in bytes, and time of modification in ns or None for any."""
BLOCK_BYTES = 512  # bytes: a tar file is made of blocks, and a member's header is one
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2", "avif")
CAPTION_NAMES = (
    "txt",
    "caption",
    "text",
)  # members that hold the answer of a picture without a record
COMPRESSED_SIGNATURES = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ\0": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}
"""How a compressed file begins, and the command that unpacks it."""
HIDDEN_FILES = "hidden files (such as ._NAME, which macOS adds)"
SPECIAL_MEMBERS = "links to nothing in the file, devices and sparse files"
REPEATED_MEMBERS = "members of a name that comes again later (the last one is read)"
OTHER_MEMBERS = "members that belong to no picture, text or json"

MemberLocation = tuple[int, int, int | None]
"""Offset and size in bytes, and the CRC-32 of the header block that ends at the offset (None in an
index of version 1)."""


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


@dataclass(frozen=True)
class ShardEntry:
    """A sample of a shard."""

    key: str
    """The name that its members share: their path up to the first dot of the file's name."""
    members: dict[str, MemberLocation]
    """Where each member is, by the rest of its name in small letters: json, 0.jpg, txt ..."""


@dataclass
class TarScan:
    """What a tar file holds."""

    entries: list[ShardEntry]
    left_out: Counter[str] = field(default_factory=Counter)
    """Number of members that are not read, by what they are."""
    fault: str = ""
    """Why there may be more samples than could be read; empty for a whole file."""

    def __len__(self) -> int:
        """Return the number of samples; what is lost behind a fault counts as one, a bad one."""
        return len(self.entries) + bool(self.fault)


class _ChecksumHeader(tarfile.TarInfo):
    """A member that knows the checksum of its header block."""

    crc = 0

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str | None, errors: str) -> _ChecksumHeader:
        """Read a header block."""
        member = super().frombuf(buf, encoding, errors)  # type: ignore[arg-type]
        member.crc = zlib.crc32(buf)
        return member


def scan_tar(tar: str) -> TarScan:
    """Read the headers of a tar file.

    Members of a key are one sample, wherever in the file they are. Raises a Mistake for a file that
    is missing, cannot be read, or is no tar file from its first byte on.
    """
    refuse_lfs_pointer(Path(tar))
    samples = _MemberCollector()
    try:
        with open(tar, "rb") as stream:
            _check_beginning(tar, stream)
            with tarfile.open(fileobj=stream, mode="r:", tarinfo=_ChecksumHeader) as file:
                fault = _read_members(file, os.fstat(stream.fileno()).st_size, samples)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{tar}: is no tar file, or cannot be read ({error})") from error
    return samples.finish_scan(fault)


def _check_beginning(tar: str, stream: IO[bytes]) -> None:
    begins = stream.read(BLOCK_BYTES)
    stream.seek(0)
    if not begins:
        raise UserError(f"{tar}: is empty (0 bytes)")
    for magic, command in COMPRESSED_SIGNATURES.items():
        if begins.startswith(magic):
            raise UserError(compressed_message(tar, command))


def compressed_message(tar: str, command: str) -> str:
    """Say that a file is compressed, and what helps."""
    return f"{tar}: is compressed; no sample can be reached by number in it: {command} {tar}"


def _read_members(file: tarfile.TarFile, size: int, collector: _MemberCollector) -> str:
    """Take all members of a file of `size` bytes; say why its end cannot be trusted, or ""."""
    try:
        while (member := file.next()) is not None:
            if member.isfile() and member.offset_data + member.size > size:
                return f"is torn: it ends at byte {size}, inside of {member.name}"
            collector.add_member(member)
    except tarfile.TarError:  # a header, or the padding behind a member, is cut
        if not file.offset:
            raise
    return _ending_fault(file, size)


def _ending_fault(file: tarfile.TarFile, size: int) -> str:
    """Say what is wrong where the members end; "" for end-of-archive blocks and nothing else."""
    stream, offset = file.fileobj, file.offset
    assert stream is not None
    stream.seek(offset)
    block = stream.read(BLOCK_BYTES)
    if len(block) < BLOCK_BYTES:
        return f"is torn: it ends at byte {size}, without end-of-archive blocks"
    if any(block):
        return f"is damaged: at byte {offset} there is no header of a member"
    while chunk := stream.read(1 << 20):
        if any(chunk):
            return (
                f"has more behind its end-of-archive blocks at byte {offset}, which is not read "
                "(are these two tar files in one?)"
            )
    return ""


class _MemberCollector:
    """The members read so far, by key."""

    def __init__(self) -> None:
        self.entries: dict[str, ShardEntry] = {}
        self.locations: dict[str, MemberLocation] = {}
        self.left_out: Counter[str] = Counter()

    def add_member(self, member: tarfile.TarInfo) -> None:
        """Take a member, or count it as left out."""
        if member.isdir():
            return
        folder, _, name = member.name.rpartition("/")
        if name.startswith("."):
            self.left_out[HIDDEN_FILES] += 1
            return
        place = self._locate_member(member)
        if place is None:
            self.left_out[SPECIAL_MEMBERS] += 1
            return
        self.locations[member.name] = place
        stem, _, kind = name.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        members = self.entries.setdefault(key, ShardEntry(key, {})).members
        self.left_out[REPEATED_MEMBERS] += kind.lower() in members
        members[kind.lower()] = place

    def _locate_member(self, member: tarfile.TarInfo) -> MemberLocation | None:
        """Return where the content is: for a hard link, that of the member which it names."""
        if member.islnk():
            return self.locations.get(member.linkname)
        if not member.isfile() or member.issparse():
            return None
        return member.offset_data, member.size, getattr(member, "crc", None)

    def finish_scan(self, fault: str) -> TarScan:
        """Return what was found."""
        entries = list(self.entries.values())
        read = [entry for entry in entries if any(map(_is_used_member, entry.members))]
        self.left_out[OTHER_MEMBERS] += sum(
            not _is_used_member(kind) for one in entries for kind in one.members
        )
        if fault and len(read) > 1 and set(read[-1].members) < set(read[-2].members):
            read.pop()  # the file ends in the middle of this sample
        if fault:
            fault += f"; {len(read)} samples before that can be read"
        return TarScan(read, +self.left_out, fault)


def _is_used_member(suffix: str) -> bool:
    return suffix == "json" or suffix in CAPTION_NAMES or suffix.split(".")[-1] in IMAGE_EXTENSIONS
