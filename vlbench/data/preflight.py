"""What can be known about the data before training starts."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from vlbench.data.record_keys import has_no_content
from vlbench.data.remote import is_url
from vlbench.data.sample import Picture, Sample, Source, sample_at
from vlbench.data.shards import Shards
from vlbench.mistakes import BadSample, Mistake

OPENED = 500  # pictures of a source up to which all are opened

LOOKED_AT = 16  # samples of shards, evenly spread, of which one must be usable

UNREADABLE = 5  # samples that cannot be read until a search among them ends


@runtime_checkable
class Checkable(Protocol):
    """A source that can check itself without opening pictures."""

    def faults(self, see: Callable[[Sample], None] | None = None) -> list[BadSample]:
        """Return every sample that is known to be bad; call `see` with well-formed samples."""
        ...


@dataclass
class Found:
    """What was found in a source."""

    bad: list[BadSample]
    """Samples that cannot be used, each with its first fault; of a missing shard the first."""
    more: int = 0
    """The other samples of missing shards."""
    unread: Counter[str] = field(default_factory=Counter)
    """In how many well-formed samples a key is there and not read."""
    untagged: int = 0
    """Samples whose only picture has no tag."""

    @property
    def count(self) -> int:
        """How many samples cannot be used."""
        return len(self.bad) + self.more

    def told(self) -> str:
        """Return the keys that are not read and may hold something to learn; "" for none."""
        return ", ".join(
            f"{key!r} ({count} records)"
            for key, count in self.unread.most_common()
            if not has_no_content(key)
        )


def preflight(source: Source, limit_open: int = OPENED) -> list[BadSample]:
    """Return the bad samples of a source; see `look_through`."""
    return look_through(source, limit_open).bad


def look_through(source: Source, limit_open: int = OPENED) -> Found:
    """Look at all records of a source and whether its image files exist.

    Pictures are opened too when there are at most `limit_open` of them. Of shards it is only looked
    whether the files are there and whole; rendered scenes are as they are.
    """
    if isinstance(source, Shards):  # too many to be read
        return _missing(source)
    if not isinstance(source, Checkable):
        return Found([])
    found = Found([])
    pictures: set[Picture] = set()

    def see(sample: Sample) -> None:
        found.unread.update(sample.unread)
        found.untagged += sample.untagged
        if len(pictures) <= limit_open:
            pictures.update(sample.pictures)

    found.bad = source.faults(see)
    if len(pictures) <= limit_open:
        found.bad = _unopened(source)
    return found


def shows_pictures(source: Source, bad: list[BadSample]) -> bool:
    """Tell whether any sample of a source, those in `bad` left out, has a picture.

    True also of a source of which UNREADABLE samples cannot be read now: nobody knows.
    """
    left_out = {one.record for one in bad}
    unreadable = 0
    for index in range(len(source)):
        if index + 1 in left_out:
            continue
        try:
            if source[index].pictures:
                return True
        except BadSample:
            unreadable += 1
            if unreadable == UNREADABLE:
                return True
    return False


def none_usable(source: Shards, bad: list[BadSample]) -> tuple[int, BadSample] | None:
    """Look for a usable sample in shards, in vain: how many were read, and what was wrong first.

    None if one was found, which ends the search; at most LOOKED_AT are read, and none of `bad`.
    """
    left_out = {one.record for one in bad}
    count = min(LOOKED_AT, len(source))
    places = (number * len(source) // count for number in range(count))
    faults: list[BadSample] = []
    for index in places:
        if index + 1 in left_out:
            continue
        try:
            _open_all(sample_at(source, index), {})
            return None
        except BadSample as fault:
            faults.append(fault)
    return (len(faults), faults[0]) if faults else None


def _missing(source: Shards) -> Found:
    """Return what was found torn while it was opened, and the shards that are not there.

    Those behind a URL are not asked for.
    """
    found, first = Found(list(source.torn())), 1
    for tar, count in zip(source.tars, source.counts, strict=True):
        if not is_url(tar) and not os.path.exists(tar):
            bad = BadSample(f"{os.path.basename(tar)} 0", f"{tar}: does not exist")
            found.bad.append(bad.at(source.name, first))
            found.more += count - 1
        first += count
    return found


def _unopened(source: Source) -> list[BadSample]:
    """Return the bad samples of a source, all pictures opened."""
    faults: list[BadSample] = []
    reasons: dict[Picture, str] = {}
    for index in range(len(source)):
        try:
            _open_all(sample_at(source, index), reasons)
        except BadSample as fault:
            faults.append(fault)
    return faults


def _open_all(sample: Sample, reasons: dict[Picture, str]) -> None:
    """Open the pictures of a sample, each only once; raise BadSample for the first that fails."""
    for picture in sample.pictures:
        if picture not in reasons:
            reasons[picture] = _reason(picture)
        if reasons[picture]:
            raise BadSample(sample.id, reasons[picture]).of(sample)


def _reason(picture: Picture) -> str:
    """Say why a picture cannot be opened, or return an empty text."""
    try:
        picture.open()
    except Mistake as mistake:
        return str(mistake)
    return ""
