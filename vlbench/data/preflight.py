"""What can be known about the data before training starts."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from vlbench.data.sample import Picture, Sample, Source
from vlbench.data.shards import Shards
from vlbench.mistakes import BadSample, Mistake


@runtime_checkable
class Checkable(Protocol):
    """A source that can check itself without opening pictures."""

    def faults(self) -> list[BadSample]:
        """Return every sample that is known to be bad."""
        ...


def preflight(source: Source, limit_open: int = 500) -> list[BadSample]:
    """Return the bad samples of a source, each with its first fault.

    Checks the structure of all records and that the image files exist; opens the pictures too when
    there are at most `limit_open` of them. A source without files (rendered) has no faults.
    """
    if isinstance(source, Shards):  # too many to be read: what was found while they were opened
        return source.torn()
    if not isinstance(source, Checkable):
        return []
    if _more_pictures(source, limit_open):
        return source.faults()
    faults: list[BadSample] = []
    reasons: dict[Picture, str] = {}
    for index in range(len(source)):
        try:
            _open_all(source[index], reasons)
        except BadSample as fault:
            faults.append(fault)
    return faults


def _more_pictures(source: Source, limit: int) -> bool:
    """Tell whether the source has more than `limit` different pictures."""
    pictures: set[Picture] = set()
    for index in range(len(source)):
        try:
            pictures.update(source[index].pictures)
        except BadSample:
            continue
        if len(pictures) > limit:
            return True
    return False


def _open_all(sample: Sample, reasons: dict[Picture, str]) -> None:
    """Open the pictures of a sample, each only once; raise BadSample for the first that fails."""
    for picture in sample.pictures:
        if picture not in reasons:
            reasons[picture] = _reason(picture)
        if reasons[picture]:
            raise BadSample(sample.id, reasons[picture])


def _reason(picture: Picture) -> str:
    """Say why a picture cannot be opened, or return an empty text."""
    try:
        picture.open()
    except Mistake as mistake:
        return str(mistake)
    return ""
