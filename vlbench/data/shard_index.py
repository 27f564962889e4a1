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

import contextlib
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, overload

from vlbench.data import record_files
from vlbench.data.remote_shards import (
    append_name,
    file_exists,
    is_url,
    read_whole_file,
    remote_file_size,
    shown_name,
)
from vlbench.errors import UserError
from vlbench.regular_files import MAX_RECORDS_BYTES, format_bytes, open_regular, read_regular_text
from vlbench.text_files import (
    format_json_lines,
    parse_json,
    refuse_lfs_pointer,
    split_lines,
    write_atomically,
)

INDEX_VERSION = 2

FileStamp = tuple[int, int | None]
"""Size in bytes, and time of modification in ns or None for any."""

MAX_PADDING_BYTES = 1 << 26  # of zeros at the end of a tar file; tar writes at most some MB
MAX_SHARD_SAMPLES = 1_000_000_000  # of one tar file: more is a slip in its list or index
MAX_HEADER_BYTES = 1 << 16  # of the first line of an index
BLOCK_BYTES = 512  # of a block of a tar file; a member's header is one block
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2", "avif")
CAPTION_NAMES = ("txt", "caption", "text")  # members with the caption of an image without a record
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
OTHER_MEMBERS = "members that belong to no image, text or json"

MemberLocation = tuple[int, int, int | None]
"""Offset and size in bytes, and the CRC-32 of the header block that ends at the offset (None in an
index of version 1)."""


def index_path(tar: str) -> str:
    """Return the file of a shard's index."""
    return append_name(tar, ".index")


def file_stamp(tar: str) -> FileStamp | None:
    """Return size and modification time of a tar file; None for a URL or a missing file."""
    if is_url(tar):
        return None
    try:
        return record_files.file_stamp(tar)
    except OSError:
        return None


def load_shard_index(tar: str) -> TarScan:
    """Return the index of a shard; where none matches, the tar file is scanned to make it.

    It is written beside the shard if the folder is writable. Raises a UserError for a shard that is
    missing or not a tar file, and for a URL without an index, which would have to be downloaded.
    """
    if is_url(tar):
        return _load_remote_index(tar)
    try:
        content = read_regular_text(index_path(tar), MAX_RECORDS_BYTES)
        first_line, _, rest = content.partition("\n")
        header = _parse_header(first_line)
        if _matches_tar(header, tar):
            return _parse_index(header, rest)
    except (OSError, ValueError):  # it is missing or incomplete
        pass
    return _build_index(tar)


def load_shard_summary(tar: str) -> tuple[int, Counter[str], str]:
    """Return a shard's number of samples, the numbers of members left out, and its fault.

    Of a matching index only the first line is read.
    """
    if not is_url(tar):
        try:
            with open_regular(index_path(tar)) as file:
                header = _parse_header(file.readline(MAX_HEADER_BYTES).decode())
            if _matches_tar(header, tar):
                fault = header["fault"]
                return header["samples"] + bool(fault), Counter(header["left_out"]), fault
        except (OSError, ValueError):
            pass
    scan = load_shard_index(tar)
    return len(scan), scan.left_out, scan.fault


def format_index(tar_scan: TarScan, tar_stamp: FileStamp) -> str:
    """Return the content of an index file: a line about the tar file, a line per sample."""
    header = {
        "version": INDEX_VERSION,
        "size": tar_stamp[0],
        "mtime": tar_stamp[1],
        "samples": len(tar_scan.entries),
        "fault": tar_scan.fault,
        "left_out": tar_scan.left_out,
    }
    return format_json_lines((header, *([entry.key, entry.members] for entry in tar_scan.entries)))


def _build_index(tar: str) -> TarScan:
    """Scan a tar file, and write the index beside it."""
    stamp = file_stamp(tar)  # taken first: a file that changes during the scan is scanned again
    scan = scan_tar(tar)
    if stamp is None:  # it appeared only now
        return scan
    with contextlib.suppress(OSError):  # the folder is not writable: every process builds its own
        write_atomically(Path(index_path(tar)), format_index(scan, stamp))
    return scan


def _parse_header(line: str) -> dict[str, Any]:
    """Return the first line of an index; ValueError for that of another version."""
    header = parse_json(line)
    if not isinstance(header, dict) or header.get("version") != INDEX_VERSION:
        raise ValueError("is not of this version")
    numbers = [header.get("size"), header.get("samples"), header.get("mtime") or 0]
    left_out = header.get("left_out")
    counts = left_out.values() if isinstance(left_out, dict) else [None]
    is_counted = all(type(number) is int and number >= 0 for number in (*numbers, *counts))
    is_typed = is_counted and type(header.get("fault")) is str
    if not is_typed or header["samples"] > MAX_SHARD_SAMPLES:
        raise ValueError("has a first line that none has")
    return header


def _matches_tar(header: dict[str, Any], tar: str) -> bool:
    """Tell whether an index was made of this very file; True where the file is missing."""
    stamp = file_stamp(tar)
    return stamp is None or (header["size"], header["mtime"] or stamp[1]) == stamp


def _parse_index(header: dict[str, Any], content: str) -> TarScan:
    """Return the content of an index; ValueError where lines are missing."""
    entries = IndexLines(split_lines(content))
    if len(entries) != header["samples"]:
        raise ValueError(f"has {len(entries)} of {header['samples']} samples")
    return TarScan(entries, Counter(header["left_out"]), header["fault"])


def _parse_entry(line: str) -> ShardEntry:
    try:
        key, members = parse_json(line)
        return ShardEntry(
            key, {name: _parse_location(*numbers) for name, numbers in members.items()}
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{line[:40]!r} is not a line of an index") from error


def _parse_location(offset: int, size: int, header_crc: int | None = None) -> MemberLocation:
    if any(type(number) is not int for number in (offset, size, header_crc or 0)):
        raise TypeError("members have numbers")
    return offset, size, header_crc


def _load_remote_index(tar: str) -> TarScan:
    """Return the index of a URL, which must exist; one of version 1 has no header line."""
    path, name = index_path(tar), shown_name(tar)
    if not file_exists(path):
        missing = shown_name(path)
        raise UserError(f"{name}: has no {missing}, which shards by URL need: pack writes it")
    content = read_whole_file(path, MAX_RECORDS_BYTES).decode("utf-8", "replace")
    first_line, _, rest = content.partition("\n")
    try:
        if first_line.startswith("["):
            return TarScan(IndexLines(split_lines(content)))
        header = _parse_header(first_line)
        scan = _parse_index(header, rest)
    except ValueError as error:
        raise UserError(f"{shown_name(path)}: is not an index of shards ({error})") from error
    size = remote_file_size(tar)
    if size is not None and size > header["size"]:  # a truncated one fails sample by sample
        raise UserError(
            f"{name}: has {size} bytes and its index is of one with {header['size']}: make the "
            "index anew, by reading a copy of the shard, or with pack"
        )
    return scan


@dataclass(frozen=True)
class ShardEntry:
    """A sample of a shard."""

    key: str
    """The name that its members share: their path up to the first dot of the file's name."""
    members: dict[str, MemberLocation]
    """Where each member is, by the rest of its name in lower case: json, 0.jpg, txt ..."""


class IndexLines(Sequence[ShardEntry]):
    """The samples of an index as its lines, of which one is parsed when it is asked for.

    They take a fifth of the memory: 1.8 MB for 10,000 samples of three members.
    """

    def __init__(self, lines: list[str]) -> None:
        """Check the lines; ValueError for one that is none of an index."""
        for line in lines:
            _parse_entry(line)
        self._lines = lines

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, index: int) -> ShardEntry: ...

    @overload
    def __getitem__(self, index: slice) -> list[ShardEntry]: ...

    def __getitem__(self, index: int | slice) -> ShardEntry | list[ShardEntry]:
        if isinstance(index, slice):
            return [_parse_entry(line) for line in self._lines[index]]
        return _parse_entry(self._lines[index])


@dataclass
class TarScan:
    """The samples of a tar file."""

    entries: Sequence[ShardEntry]
    left_out: Counter[str] = field(default_factory=Counter)
    """Number of members that are not read, by kind."""
    fault: str = ""
    """Why there may be more samples than could be read; empty for a complete file."""

    def __len__(self) -> int:
        """Return the number of samples; a fault counts as one more, a bad sample."""
        return len(self.entries) + bool(self.fault)


class _ChecksumHeader(tarfile.TarInfo):
    """A member with the CRC-32 of its header block."""

    crc = 0

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str | None, errors: str) -> _ChecksumHeader:
        """Read a header block."""
        member = super().frombuf(buf, encoding, errors)  # type: ignore[arg-type]
        member.crc = zlib.crc32(buf)
        return member


def scan_tar(tar: str) -> TarScan:
    """Read the headers of a tar file.

    Members of a key are one sample, wherever in the file they are. Raises a UserError for a file
    that is missing, cannot be read, or does not begin as a tar file.
    """
    refuse_lfs_pointer(Path(tar))
    collector = _MemberCollector()
    try:
        with open_regular(tar) as stream:
            _check_beginning(tar, stream)
            with tarfile.open(fileobj=stream, mode="r:", tarinfo=_ChecksumHeader) as file:
                fault = _read_members(file, os.fstat(stream.fileno()).st_size, collector)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{tar}: is not a tar file, or cannot be read ({error})") from error
    return collector.finish_scan(fault)


def _check_beginning(tar: str, stream: IO[bytes]) -> None:
    first_block = stream.read(BLOCK_BYTES)
    stream.seek(0)
    if not first_block:
        raise UserError(f"{tar}: is empty (0 bytes)")
    for signature, command in COMPRESSED_SIGNATURES.items():
        if first_block.startswith(signature):
            raise UserError(compressed_message(tar, command))


def compressed_message(tar: str, command: str) -> str:
    """Return a message that a file is compressed, with the command that decompresses it."""
    return f"{tar}: is compressed; no sample can be reached by number in it: {command} {tar}"


def _read_members(file: tarfile.TarFile, size: int, collector: _MemberCollector) -> str:
    """Collect all members of a file of `size` bytes; return its fault, or ""."""
    try:
        while (member := file.next()) is not None:
            if member.isfile() and member.offset_data + member.size > size:
                return f"is truncated: it ends at byte {size}, inside of {member.name}"
            collector.add_member(member)
    except tarfile.TarError:  # a header, or the padding after a member, is truncated
        if not file.offset:
            raise
    return _ending_fault(file, size)


def _ending_fault(file: tarfile.TarFile, size: int) -> str:
    """Return the fault where the members end; "" for end-of-archive blocks and nothing else."""
    stream, offset = file.fileobj, file.offset
    assert stream is not None
    stream.seek(offset)
    block = stream.read(BLOCK_BYTES)
    if len(block) < BLOCK_BYTES:
        return f"is truncated: it ends at byte {size}, without end-of-archive blocks"
    if any(block):
        return f"is damaged: at byte {offset} there is no header of a member"
    if size - offset > MAX_PADDING_BYTES:
        return f"has {format_bytes(size - offset)} after its last member, which are not read"
    while chunk := stream.read(1 << 20):
        if any(chunk):
            return (
                f"has more after its end-of-archive blocks at byte {offset}, which is not read "
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
        """Add a member, or count it as left out."""
        if member.isdir():
            return
        folder, _, name = member.name.rpartition("/")
        if name.startswith("."):
            self.left_out[HIDDEN_FILES] += 1
            return
        location = self._locate_member(member)
        if location is None:
            self.left_out[SPECIAL_MEMBERS] += 1
            return
        self.locations[member.name] = location
        stem, _, suffix = name.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        members = self.entries.setdefault(key, ShardEntry(key, {})).members
        self.left_out[REPEATED_MEMBERS] += suffix.lower() in members
        members[suffix.lower()] = location

    def _locate_member(self, member: tarfile.TarInfo) -> MemberLocation | None:
        """Return where the content is; a hard link has that of the member which it names."""
        if member.islnk():
            return self.locations.get(member.linkname)
        if not member.isfile() or member.issparse():
            return None
        return member.offset_data, member.size, getattr(member, "crc", None)

    def finish_scan(self, fault: str) -> TarScan:
        """Return the samples; `fault` is that of the end of the file."""
        entries = list(self.entries.values())
        samples = [entry for entry in entries if any(map(_is_used_member, entry.members))]
        self.left_out[OTHER_MEMBERS] += sum(
            not _is_used_member(suffix) for entry in entries for suffix in entry.members
        )
        if fault and len(samples) > 1 and set(samples[-1].members) < set(samples[-2].members):
            samples.pop()  # the file ends in the middle of this sample
        if fault:
            fault += f"; {len(samples)} samples before that can be read"
        return TarScan(samples, +self.left_out, fault)


def _is_used_member(suffix: str) -> bool:
    return suffix == "json" or suffix in CAPTION_NAMES or suffix.split(".")[-1] in IMAGE_EXTENSIONS
