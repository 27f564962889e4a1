"""The files of one split of a benchmark: found in a folder or on the hub, and read row by row."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlbench.data.parquet_files import refuse_missing_files
from vlbench.errors import UserError, one_line, suggest_name
from vlbench.evaluate.tasks.benchmark_types import BenchmarkRecord
from vlbench.hub_download import fetch_hub_folder
from vlbench.regular_files import MAX_RECORDS_BYTES, open_regular
from vlbench.text_files import parse_json, read_text, refuse_lfs_pointer

SPLIT_ALIASES = {"val": "validation"}  # two names of one split
FOLDER_DEPTHS = ("", "*/", "*/*/")  # where files are looked for below the folder
ROWS_IN_MEMORY = 64  # rows in memory at once, besides the records: images are large
# hub: [subject or data/]validation-00000-of-00002.parquet
_PARQUET_NAME = re.compile(r"([A-Za-z_]+)(?:-\d+-of-\d+.*)?\.parquet")
# CMMMU on GitHub: cmmmu-data-val/art_and_design/art_and_design.jsonl
_GITHUB_FOLDER = re.compile(r"cmmmu-data-([A-Za-z]+)")


@dataclass(frozen=True)
class SplitFiles:
    """The files of a split."""

    source: str
    """The folder or hub id that the user gave."""
    split_name: str
    """val, or whatever name the user gave."""
    files: tuple[Path, ...]

    def data_revision(self) -> str:
        """Return what identifies the data: the hub's commit, or a hash of the files' contents."""
        for folder in self.files[0].parents:
            if folder.parent.name == "snapshots":
                return f"hub {folder.name}"
        digest = hashlib.sha256()
        for file in self.files:
            with open_regular(file) as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return f"sha256 {digest.hexdigest()[:16]}"


def find_split(source: str, split: str) -> SplitFiles:
    """Return the files of a split of `source`: a folder, a file, or a hub id (OWNER/NAME).

    Raises a UserError when there is nothing, no such split (it says which there are), or when one
    of its files is missing.
    """
    path = Path(source).expanduser()
    names = {split, *(name for pair in SPLIT_ALIASES.items() if split in pair for name in pair)}
    if not path.is_file():
        patterns = tuple(f"*{name}-*.parquet" for name in sorted(names))
        wanted = " or ".join(patterns)
        path = fetch_hub_folder(str(path), "data", wanted, "folder or file", patterns, "dataset")
    splits = _files_by_split(path)
    if not splits:
        wanted = "SPLIT-*.parquet, SUBJECT/SPLIT-*.parquet or cmmmu-data-SPLIT/CATEGORY/*.jsonl"
        raise UserError(f"data is '{source}', where no split of a benchmark is; wanted is {wanted}")
    split_files = [file for name in sorted(names) for file in splits.get(name, [])]
    if not split_files:
        known = ", ".join(sorted(splits))
        raise UserError(
            f"no split '{split}' in {source}; it has {known}.{suggest_name(split, splits)}"
        )
    refuse_missing_files(split_files)
    return SplitFiles(source, split, tuple(split_files))


def _files_by_split(path: Path) -> dict[str, list[Path]]:
    """Return the files of every split at `path`, sorted."""
    if path.is_file():
        files = [path]
    else:
        patterns = [f"{depth}*.{kind}" for depth in FOLDER_DEPTHS for kind in ("parquet", "jsonl")]
        files = [file for pattern in patterns for file in path.glob(pattern) if file.is_file()]
    splits: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(files):
        folder = file.absolute().parent.parent.name
        match = _PARQUET_NAME.fullmatch(file.name) or _GITHUB_FOLDER.fullmatch(folder)
        if match:
            splits[match[1]].append(file)
    return dict(splits)


def select_subjects(
    subjects: Sequence[str] | None, known_names: Mapping[str, str], subject_kind: str
) -> tuple[str, ...]:
    """Return the names that `known_names` gives for `subjects`, in its order; None: all.

    Raises a UserError for an unknown subject; `subject_kind` is what the message calls it.
    """
    for subject in subjects or ():
        if subject not in known_names:
            allowed = ", ".join(known_names)
            near = suggest_name(subject, known_names)
            raise UserError(f"no {subject_kind} '{subject}'.{near} There are {allowed}")
    return tuple(
        dict.fromkeys(name for key, name in known_names.items() if not subjects or key in subjects)
    )


def order_records(
    records: list[BenchmarkRecord],
    split_files: SplitFiles,
    group_order: Sequence[str],
    group_of: Callable[[BenchmarkRecord], str],
    required_groups: Sequence[str],
) -> list[BenchmarkRecord]:
    """Return the records sorted by group; within a group they stay in the order of the data.

    Args:
        records: Those of a split.
        split_files: Where they were read from, for messages.
        group_order: The groups in their order; any other group comes last.
        group_of: Returns the group of a record.
        required_groups: The groups that must have records.

    Raises:
        UserError: There are no records, or none of a required group, or the same record is there
            twice. Different records may have the same id.
    """
    location = f"{split_files.source}, split '{split_files.split_name}'"
    missing = sorted(set(required_groups) - {group_of(record) for record in records})
    if missing or not records:
        groups = f" of {', '.join(missing)}" if missing else ""
        raise UserError(f"{location}: has no records{groups}")
    _refuse_repeats(records, location)
    rank = {name: number for number, name in enumerate(group_order)}
    return sorted(records, key=lambda record: rank.get(group_of(record), len(rank)))


def _refuse_repeats(records: list[BenchmarkRecord], location: str) -> None:
    """Raise a UserError for a record that is there several times, equal in everything."""
    ids = Counter(record.id for record in records)
    for record_id in (record_id for record_id, count in ids.items() if count > 1):
        same_id = [record for record in records if record.id == record_id]
        count = max(map(same_id.count, same_id))
        if count > 1:
            raise UserError(f"{location}: record {record_id} is there {count} times")


def read_rows(
    file: Path, required_columns: tuple[str, ...], column_pattern: str
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file as mappings of those columns whose names match `column_pattern`.

    Raises a UserError when the file cannot be read, or lacks required columns.
    """
    refuse_lfs_pointer(file)
    reader = _read_jsonl_rows if file.suffix == ".jsonl" else _read_parquet_rows
    for row in reader(file, re.compile(column_pattern)):
        missing = [name for name in required_columns if name not in row]
        if missing:
            known = ", ".join(row) or "none that is known"
            raise UserError(f"{file}: lacks the columns {', '.join(missing)}; it has {known}")
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
    for number, line in enumerate(read_text(file, MAX_RECORDS_BYTES).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"{file}: line {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{file}: line {number} is no JSON object")
        yield {name: value for name, value in row.items() if column_pattern.fullmatch(name)}
