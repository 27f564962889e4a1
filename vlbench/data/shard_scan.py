"""Read a tar file from end to end: its samples, what is left out of it, and whether it is whole."""

from __future__ import annotations

import os
import tarfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from vlbench.errors import UserError
from vlbench.text_files import refuse_lfs_pointer

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
