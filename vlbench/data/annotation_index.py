"""Where the samples of annotation files stand: found once, and kept beside files that are large.

A sample is a row of whole numbers: first and last byte of its record, which entry of the record's
lists it is, and first and last byte of each record that is joined to it. A million questions with
their answers joined take 40 MB, which the processes of a machine share.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlbench.data.json_nesting import FoundRecord
from vlbench.data.kept_numbers import read_numbers, write_numbers
from vlbench.data.mapping_texts import find_value, plain_text
from vlbench.data.record_files import FileStamp
from vlbench.data.record_offsets import MIN_INDEXED_BYTES
from vlbench.data.record_places import RecordPlace, with_key
from vlbench.errors import BadSample, UserError

NOT_FOUND = -1
_FIXED_COLUMNS = 3  # first byte, last byte, entry
_MAX_NAMED = 8  # other values of a key that a message names


@dataclass(frozen=True)
class IndexRules:
    """Which samples the records of a place are."""

    records: RecordPlace
    where: Mapping[str, tuple[str, ...]]
    """By a path, the texts of which a record has one."""
    each: tuple[str, ...] = ()
    """The lists whose entries, side by side, are samples."""
    turns: tuple[str, ...] = ()
    """The lists without whose entries a record is no sample."""
    joins: tuple[tuple[RecordPlace, str, str], ...] = ()
    """Records that belong to a record: where they are, their key, and the path to the same text."""

    @property
    def stamps(self) -> list[FileStamp]:
        """Of the files."""
        return [self.records.stamp, *(place.stamp for place, _, _ in self.joins)]

    def digest(self) -> str:
        """Return a short hash of the rules, the files' contents left out."""
        places = [self.records, *(place for place, _, _ in self.joins)]
        layouts = [
            [place.file.name, place.at, place.pattern.text if place.pattern else ""]
            for place in places
        ]
        keys = [[by, of] for _, by, of in self.joins]
        rules = [layouts, keys, sorted(self.where.items()), self.each, self.turns]
        return hashlib.sha256(json.dumps(rules).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class SampleRows:
    """The rows of all samples `[samples, 3 + 2 * joins]`."""

    numbers: NDArray[np.int64]
    index_file: str = ""
    """Where they are kept; "" for nowhere."""
    about: tuple[tuple[str, Any], ...] = ()
    """What the index says of its files."""

    def __len__(self) -> int:
        return len(self.numbers)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let another process map the index itself, instead of copying it."""
        if self.index_file:
            return _map_rows, (self.index_file, self.about)
        return SampleRows, (self.numbers,)


def find_rows(rules: IndexRules) -> SampleRows:
    """Return the rows from the index beside the records, or by a search, which makes the index.

    Raises OSError, and a UserError where the files are not as the rules say.
    """
    if sum(size for size, _ in set(rules.stamps)) < MIN_INDEXED_BYTES:
        return SampleRows(_search_rows(rules))
    digest = rules.digest()
    index_file = f"{rules.records.file}.{digest[:8]}.index"
    stamps = [list(stamp) for stamp in rules.stamps]
    about = (("rules", digest), ("stamps", stamps))
    with contextlib.suppress(OSError, ValueError):  # it is missing, or of other files
        return _map_rows(index_file, about)
    numbers = _search_rows(rules)
    with contextlib.suppress(OSError, ValueError):  # the folder is not writable, the disk full
        write_numbers(Path(index_file), numbers, dict(about))
        return _map_rows(index_file, about)
    return SampleRows(numbers)


def _map_rows(index_file: str, about: tuple[tuple[str, Any], ...]) -> SampleRows:
    numbers, _ = read_numbers(index_file, dict(about))
    if numbers.ndim != 2 or numbers.shape[1] < _FIXED_COLUMNS:
        raise ValueError("is of another kind")
    return SampleRows(numbers, index_file, about)


def _search_rows(rules: IndexRules) -> NDArray[np.int64]:
    """Search the files, the records first and then what is joined to them."""
    flat, hashes = array("q"), [array("Q") for _ in rules.joins]
    others: dict[str, None] = {}
    for number, found in enumerate(rules.records.iterate_records(), start=1):
        with _naming_record(rules.records, number):
            if not _is_wanted(found, rules.where, others):
                continue
        count = _count_samples(found.value, rules)
        joined = [_hash_at(found, of) for _, _, of in rules.joins]
        for entry in range(count):
            flat.extend((found.start, found.end, entry))
        for column, value in zip(hashes, joined, strict=True):
            column.extend([value] * count)
    if not flat:
        raise _no_samples_error(rules, list(others))
    rows = np.frombuffer(flat, np.int64).reshape(-1, _FIXED_COLUMNS)
    columns = [
        _find_joined(place, by, np.frombuffer(column, np.uint64))
        for (place, by, _), column in zip(rules.joins, hashes, strict=True)
    ]
    return np.concatenate([rows, *columns], axis=1)


def _is_wanted(
    found: FoundRecord, where: Mapping[str, tuple[str, ...]], others: dict[str, None]
) -> bool:
    """Tell whether a record has the texts that are wanted; note some that it has instead."""
    if not isinstance(found.value, dict):  # it is a bad sample, which names it
        return True
    for path, wanted in where.items():
        value = find_value(with_key(found.value, found.key), path)
        text = plain_text(value)
        text = json.dumps(value) if text is None else text
        if text not in wanted:
            if len(others) <= _MAX_NAMED:
                others[text] = None
            return False
    return True


def _count_samples(record: Any, rules: IndexRules) -> int:
    """Return how many samples a record is; one that is wrong is one, which will be told."""
    names = rules.each or rules.turns
    lists = [record.get(name) for name in names] if isinstance(record, dict) else []
    lengths = {len(one) if isinstance(one, list) else NOT_FOUND for one in lists}
    if len(lengths) != 1 or NOT_FOUND in lengths:
        return 1
    return lengths.pop() if rules.each else min(1, lengths.pop())


def _hash_at(found: FoundRecord, path: str) -> int:
    """Return the hash of the text at a path, 0 for none: that is told when the record is read."""
    try:
        return short_hash(plain_text(find_value(with_key(found.value, found.key), path)))
    except BadSample:
        return 0


def short_hash(text: str | None) -> int:
    """Return a hash of 64 bits, 0 for None."""
    if text is None:
        return 0
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _find_joined(place: RecordPlace, by: str, wanted: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return first and last byte of the record whose key has each hash `[samples, 2]`."""
    flat, hashes = array("q"), array("Q")
    for number, found in enumerate(place.iterate_records(), start=1):
        with _naming_record(place, number):
            hashes.append(short_hash(plain_text(find_value(with_key(found.value, found.key), by))))
        flat.extend((found.start, found.end))
    if not flat:
        raise UserError(f"{place.file}: holds no records")
    known, ranges = np.frombuffer(hashes, np.uint64), np.frombuffer(flat, np.int64).reshape(-1, 2)
    order = np.argsort(known, kind="stable")  # of equal keys the first counts
    known, ranges = known[order], ranges[order]
    nearest = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    is_found = (known[nearest] == wanted) & (wanted != 0)
    return np.where(is_found[:, None], ranges[nearest], NOT_FOUND)


@contextlib.contextmanager
def _naming_record(place: RecordPlace, number: int) -> Iterator[None]:
    """Let a BadSample be a UserError with the file and the number of the record."""
    try:
        yield
    except BadSample as bad:
        raise UserError(f"{place.file}: record {number} {bad.reason}") from None


def _no_samples_error(rules: IndexRules, others: list[str]) -> UserError:
    if not others:
        return UserError(f"{rules.records.file}: holds no records")
    wanted = " and ".join(
        f"{path!r} {' or '.join(map(repr, texts))}" for path, texts in rules.where.items()
    )
    named = ", ".join(map(repr, others[:_MAX_NAMED]))
    return UserError(f"{rules.records.file}: no record has {wanted}; they have {named}")
