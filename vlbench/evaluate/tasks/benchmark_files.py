"""The files of one split of a benchmark: found in a folder or on the hub, and read row by row."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlbench.errors import UserError, one_line, suggest_name
from vlbench.evaluate.tasks.benchmark_types import BenchmarkRecord
from vlbench.model.weights.hub_download import fetch_hub_folder
from vlbench.text_files import read_text, refuse_lfs_pointer

SPLIT_ALIASES = {"val": "validation"}  # two words for one split
FOLDER_DEPTHS = ("", "*/", "*/*/")  # of files below the folder
ROWS_IN_MEMORY = 64  # rows in memory at once, besides the records: pictures are large
# hub: [subject or data/]validation-00000-of-00002.parquet
_PARQUET_NAME = re.compile(r"([A-Za-z_]+)(?:-(\d+)-of-(\d+).*)?\.parquet")
# CMMMU on GitHub: cmmmu-data-val/art_and_design/art_and_design.jsonl
_GITHUB_FOLDER = re.compile(r"cmmmu-data-([A-Za-z]+)")


@dataclass(frozen=True)
class SplitFiles:
    """The files of a split."""

    source: str
    """The folder or hub id that the user gave."""
    split_name: str
    """As the user gave it."""
    files: tuple[Path, ...]

    def data_revision(self) -> str:
        """Return what identifies the data: the hub's commit, or a hash of the files' contents."""
        for folder in self.files[0].parents:
            if folder.parent.name == "snapshots":
                return f"hub {folder.name}"
        whole = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as stream:
                whole.update(hashlib.file_digest(stream, "sha256").digest())
        return f"sha256 {whole.hexdigest()[:16]}"


def find_split(source: str, split: str) -> SplitFiles:
    """Return the files of a split of `source`: a folder, a file, or a hub id (OWNER/NAME).

    Raises a Mistake when there is nothing, no such split (saying which there are), or when one of
    its files is missing.
    """
    path = Path(source).expanduser()
    names = {split, *(word for pair in SPLIT_ALIASES.items() if split in pair for word in pair)}
    if not path.is_file():
        patterns = tuple(f"*{name}-*.parquet" for name in sorted(names))
        files = " or ".join(patterns)
        path = fetch_hub_folder(str(path), "data", files, "folder or file", patterns, "dataset")
    splits = _files_by_split(path)
    if not splits:
        wanted = "SPLIT-*.parquet, SUBJECT/SPLIT-*.parquet or cmmmu-data-SPLIT/CATEGORY/*.jsonl"
        raise UserError(f"data is '{source}', where no split of a benchmark is; wanted is {wanted}")
    found = [file for name in sorted(names) for file in splits.get(name, [])]
    if not found:
        there = ", ".join(sorted(splits))
        raise UserError(
            f"no split '{split}' in {source}; it has {there}.{suggest_name(split, splits)}"
        )
    _refuse_gaps(found)
    return SplitFiles(source, split, tuple(found))


def _files_by_split(path: Path) -> dict[str, list[Path]]:
    """Return the files of every split that lies at `path`, sorted."""
    if path.is_file():
        files = [path]
    else:
        patterns = [f"{depth}*.{kind}" for depth in FOLDER_DEPTHS for kind in ("parquet", "jsonl")]
        files = [file for pattern in patterns for file in path.glob(pattern)]
    splits: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(files):
        folder = file.absolute().parent.parent.name
        named = _PARQUET_NAME.fullmatch(file.name) or _GITHUB_FOLDER.fullmatch(folder)
        if named:
            splits[named[1]].append(file)
    return dict(splits)


def _refuse_gaps(files: list[Path]) -> None:
    """Raise a Mistake when one of several files of a split is missing."""
    have: dict[tuple[Path, int], set[int]] = defaultdict(set)
    for file in files:
        named = _PARQUET_NAME.fullmatch(file.name)
        if named and named[3]:
            have[file.parent, int(named[3])].add(int(named[2]))
    for (folder, shards), numbers in have.items():
        missing = sorted(set(range(shards)) - numbers)
        if missing:
            lacks = ", ".join(f"{number:05d}-of-{shards:05d}" for number in missing[:5])
            raise UserError(f"{folder}: of {shards} files {len(missing)} are missing: {lacks}")


def select_subjects(
    subjects: Sequence[str] | None, known_names: Mapping[str, str], subject_kind: str
) -> tuple[str, ...]:
    """Return the names that `known` gives for `subjects`, in the order of `known`; None: all.

    Raises a Mistake for a subject that is not known; `what` says what subjects are.
    """
    for word in subjects or ():
        if word not in known_names:
            allowed = ", ".join(known_names)
            raise UserError(
                f"no {subject_kind} '{word}'.{suggest_name(word, known_names)} There are {allowed}"
            )
    return tuple(
        dict.fromkeys(known_names[word] for word in known_names if not subjects or word in subjects)
    )


def order_records(
    records: list[BenchmarkRecord],
    split_files: SplitFiles,
    group_order: Sequence[str],
    group_of: Callable[[BenchmarkRecord], str],
    required_groups: Sequence[str],
) -> list[BenchmarkRecord]:
    """Return the records by their `group` in this `order`; within a group their order stays.

    A group that is not in the order comes last. Raises a Mistake when there is no record at all or
    of a group that was `asked` for, or when one record is there twice. Different records may have
    the same id.
    """
    where = f"{split_files.source}, split '{split_files.split_name}'"
    missing = sorted(set(required_groups) - {group_of(record) for record in records})
    if missing or not records:
        of = f" of {', '.join(missing)}" if missing else ""
        raise UserError(f"{where}: has no records{of}")
    _refuse_repeats(records, where)
    rank = {name: number for number, name in enumerate(group_order)}
    return sorted(records, key=lambda record: rank.get(group_of(record), len(rank)))


def _refuse_repeats(records: list[BenchmarkRecord], location: str) -> None:
    """Raise a Mistake for a record that is there several times, with all that it holds."""
    ids = Counter(record.id for record in records)
    for name in (name for name, count in ids.items() if count > 1):
        alike = [record for record in records if record.id == name]
        number = max(map(alike.count, alike))
        if number > 1:
            raise UserError(f"{location}: record {name} is there {number} times")


def read_rows(
    file: Path, required_columns: tuple[str, ...], column_pattern: str
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file, as mappings of those columns whose names match `wanted` (a regex).

    Raises a Mistake when the file cannot be read, or lacks columns that are `needed`.
    """
    refuse_lfs_pointer(file)
    read = _read_jsonl_rows if file.suffix == ".jsonl" else _read_parquet_rows
    for row in read(file, re.compile(column_pattern)):
        missing = [name for name in required_columns if name not in row]
        if missing:
            have = ", ".join(row) or "none that is known"
            raise UserError(f"{file}: lacks the columns {', '.join(missing)}; it has {have}")
        yield row


def _read_parquet_rows(file: Path, column_pattern: re.Pattern[str]) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as table:
            columns = [name for name in table.schema_arrow.names if column_pattern.fullmatch(name)]
            for batch in table.iter_batches(ROWS_IN_MEMORY, columns=columns):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{file}: is torn, or no parquet file ({one_line(error, max_lines=1)})"
        ) from error


def _read_jsonl_rows(file: Path, column_pattern: re.Pattern[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{file}: line {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{file}: line {number} is no JSON object")
        yield {name: value for name, value in row.items() if column_pattern.fullmatch(name)}
