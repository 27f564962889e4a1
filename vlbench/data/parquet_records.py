"""Rows of Parquet files as records, read block by block: a block is a row group, or a part of one.

A row is reached by its number, so that the order of training is a function of (seed, position); the
order is one that stays in a few blocks for a while (`pass_order`), which are kept in memory: of all
sources of a process CACHE_BYTES at most. Where images are mappings of `bytes` and `path`, a plan of
texts reads the paths alone.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlbench.data.record_files import FileStamp, file_stamp
from vlbench.data.record_images import OMITTED_BYTES
from vlbench.data.shard_sampler import MAX_LANES, RecentOrders, ShardShuffle
from vlbench.errors import UserError, one_line
from vlbench.text_files import refuse_lfs_pointer

if TYPE_CHECKING:
    from pyarrow import DataType, RecordBatch, Schema, Table
    from pyarrow.parquet import ParquetFile

BLOCK_BYTES = 1 << 25  # 34 MB, uncompressed: what of a row group is read at once
MAX_BLOCK_ROWS = 4096
BLOCK_LANES, WINDOW_BLOCKS = 4, 2  # an order reads 8 blocks alternately
CACHED_BLOCKS = 2 * (BLOCK_LANES * WINDOW_BLOCKS + 2)  # of a source, with and without images
CACHE_BYTES = 1 << 31  # 2.1 GB, of all sources: The Cauldron has fifty, of 300 MB each
LIST_NAMES = ("list", "element", "item", "bag", "array", "array_element")
"""Names in a column's path that writers put between a list and what it holds."""


@dataclass(frozen=True)
class RowBlock:
    """Consecutive rows of a row group."""

    file: Path
    stamp: FileStamp
    row_group: int
    first_row: int
    """In the row group, from 0."""
    row_count: int


class ParquetRecords:
    """The rows of several Parquet files, one file after another."""

    def __init__(self, name: str, files: Sequence[Path]) -> None:
        """Read the files' footers; raises OSError, and a UserError that names a damaged file."""
        self.name = name
        self.stamps = [file_stamp(file) for file in files]
        self.blocks = [
            block
            for file, stamp in zip(files, self.stamps, strict=True)
            for block in _find_blocks(file, stamp)
        ]
        if not self.blocks:
            raise UserError("its Parquet files hold no rows")
        self.block_counts: Sequence[int] = [block.row_count for block in self.blocks]
        self._block_ends = np.cumsum(self.block_counts)
        self._pass_orders = RecentOrders[ShardShuffle]()

    def __len__(self) -> int:
        return int(self._block_ends[-1])

    def pass_order(
        self,
        shuffle_key: str,
        block_counts: Sequence[int] | None = None,
        max_lanes: int = MAX_LANES,
    ) -> ShardShuffle:
        """Return the order of a pass over the rows, which reads few blocks at a time.

        Of some of the rows, `block_counts` says how many each block has. At most `max_lanes` lanes
        are read alternately.
        """
        lanes = min(max_lanes, BLOCK_LANES)
        if block_counts is not None:
            return ShardShuffle(block_counts, shuffle_key, WINDOW_BLOCKS, lanes)
        return self._pass_orders.find(
            shuffle_key,
            lanes,
            lambda: ShardShuffle(self.block_counts, shuffle_key, WINDOW_BLOCKS, lanes),
        )

    def folder_of(self, index: int) -> Path:
        """Return the folder of the file that row `index` (from 0) is in."""
        return self.blocks[self._block_number(index)].file.parent

    def _block_number(self, index: int) -> int:
        return int(self._block_ends.searchsorted(index, side="right"))

    def read_record(self, index: int, with_images: bool = True) -> Any:
        """Return row `index` (from 0) as a mapping; images may have OMITTED_BYTES without them."""
        number = self._block_number(index)
        row = index - (int(self._block_ends[number - 1]) if number else 0)
        return recent_blocks.load(self.name, self.blocks[number], with_images).read_row(row)


@dataclass(frozen=True)
class _LoadedBlock:
    """The rows of a block, and the images in them whose bytes were left out, by their columns."""

    table: Table
    omitted: list[list[str]]

    def read_row(self, row: int) -> dict[str, Any]:
        record = _read_values(self.table.slice(row, 1))
        for names in self.omitted:
            _mark_omitted(record, names)
        return record


class RecentBlocks:
    """The blocks that a process has read lately, of all sources."""

    def __init__(self) -> None:
        """Begin without any."""
        self._blocks: OrderedDict[tuple[str, RowBlock, bool], _LoadedBlock] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """The memory that they take."""
        return sum(block.table.nbytes for block in self._blocks.values())

    def load(self, source: str, block: RowBlock, with_images: bool) -> _LoadedBlock:
        """Return a block of a source, from memory where it was read lately."""
        key = (source, block, with_images)
        with self._lock:  # threads of `check` read alternately
            if key not in self._blocks:
                self._blocks[key] = _read_block(block, with_images)
                self._drop_oldest(source)
            self._blocks.move_to_end(key)
            return self._blocks[key]

    def _drop_oldest(self, source: str) -> None:
        """Keep to CACHED_BLOCKS of a source and to CACHE_BYTES; what was read last stays."""
        of_source = [key for key in self._blocks if key[0] == source]
        for key in of_source[:-CACHED_BLOCKS]:
            del self._blocks[key]
        while len(self._blocks) > 1 and self.held_bytes > CACHE_BYTES:
            self._blocks.popitem(last=False)


recent_blocks = RecentBlocks()


def _read_values(row: Table) -> dict[str, Any]:
    """Return the values of a table of one row; a UserError names a column that has none."""
    record: dict[str, Any] = {}
    for name, column in zip(row.column_names, row.columns, strict=True):
        try:
            record[name] = column[0].as_py()
        # a text that is not UTF-8, a day or a time zone that Python has not: Arrow checks neither
        except (ValueError, ArithmeticError, LookupError, NotImplementedError) as error:
            reason = one_line(error, max_lines=1)
            raise UserError(f"column {name!r} cannot be read ({reason})") from error
    return record


def _in_microseconds(table: Table) -> Table:
    """Return a table whose times have no nanoseconds, which Python has not: they are metadata."""
    for number, field in enumerate(table.schema):
        kind = _microsecond_type(field.type)
        if kind != field.type:
            column = table.column(number).cast(kind, safe=False)
            table = table.set_column(number, field.name, column)
    return table


def _microsecond_type(kind: DataType) -> DataType:
    """Return a type with microseconds in place of nanoseconds, inside of lists and mappings too."""
    import pyarrow as arrow
    import pyarrow.types as kinds

    if kinds.is_struct(kind):
        inner = map(kind.field, range(kind.num_fields))
        return arrow.struct([one.with_type(_microsecond_type(one.type)) for one in inner])
    if kinds.is_list(kind):
        return arrow.list_(kind.value_field.with_type(_microsecond_type(kind.value_type)))
    if getattr(kind, "unit", "") != "ns":
        return kind
    others = {"duration": arrow.duration("us"), "time64": arrow.time64("us")}
    name = str(kind).partition("[")[0]
    return others.get(name) or arrow.timestamp("us", kind.tz)


def _mark_omitted(value: Any, names: list[str]) -> None:
    """Put OMITTED_BYTES into the mappings at `names`."""
    if isinstance(value, list):
        for entry in value:
            _mark_omitted(entry, names)
    elif isinstance(value, dict) and names:
        _mark_omitted(value.get(names[0]), names[1:])
    elif isinstance(value, dict):
        value["bytes"] = OMITTED_BYTES


def _find_blocks(file: Path, stamp: FileStamp) -> Iterator[RowBlock]:
    """Yield the blocks of a file; raises OSError, and a UserError for what is no Parquet file."""
    refuse_lfs_pointer(file)
    with _open_parquet(file) as opened:
        names = opened.schema_arrow.names
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{file}: has the column {twice!r} more than once")
        for number in range(opened.metadata.num_row_groups):
            group = opened.metadata.row_group(number)
            rows_per_block = max(1, group.num_rows * BLOCK_BYTES // max(1, group.total_byte_size))
            rows_per_block = min(rows_per_block, MAX_BLOCK_ROWS)
            for first in range(0, group.num_rows, rows_per_block):
                count = min(rows_per_block, group.num_rows - first)
                yield RowBlock(file, stamp, number, first, count)


def _open_parquet(file: Path) -> ParquetFile:
    """Open a Parquet file, or raise a UserError that says why it is none."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        # read in small pieces: a column of a row group may be larger than the memory
        return ParquetFile(file, buffer_size=1 << 20)
    except (ArrowException, OSError) as error:
        raise _damaged_error(file, error) from error


def _damaged_error(file: Path, error: BaseException) -> UserError:
    reason = one_line(error, max_lines=1)
    return UserError(f"{file}: is damaged or cut off, or no Parquet file ({reason})")


def _read_block(block: RowBlock, with_images: bool) -> _LoadedBlock:
    """Read the rows of a block; a UserError where the file is another one by now."""
    from pyarrow import ArrowException, Table

    try:
        if file_stamp(block.file) != block.stamp:
            raise UserError(f"{block.file}: is another file than it was when it was opened")
        with _open_parquet(block.file) as opened:
            columns, omitted = (None, []) if with_images else _text_columns(opened, block.row_group)
            batches = list(_read_batches(opened, block, columns or None))
        return _LoadedBlock(_in_microseconds(Table.from_batches(batches)), omitted)
    except (ArrowException, OSError) as error:
        raise _damaged_error(block.file, error) from error


def _read_batches(
    opened: ParquetFile, block: RowBlock, columns: list[str] | None
) -> Iterator[RecordBatch]:
    """Yield the rows of a block; those before it in its row group are read and dropped."""
    first, last = block.first_row, block.first_row + block.row_count
    position = 0
    for batch in opened.iter_batches(
        min(block.row_count, MAX_BLOCK_ROWS), [block.row_group], columns, use_threads=False
    ):
        start, end = max(first - position, 0), min(last - position, batch.num_rows)
        if start < end:
            yield batch.slice(start, end - start)
        position += batch.num_rows
        if position >= last:
            return


def _text_columns(opened: ParquetFile, row_group: int) -> tuple[list[str], list[list[str]]]:
    """Return the columns of a row group without bytes of images, and where those were.

    Bytes are left out beside a `path` that tells how many images there are; not where some are
    null, as such an image may be a file, or none.
    """
    group, schema = opened.metadata.row_group(row_group), opened.schema_arrow
    paths = [group.column(number).path_in_schema for number in range(group.num_columns)]
    kept, omitted = [], []
    for number, path in enumerate(paths):
        prefix, _, last_name = path.rpartition(".")
        statistics = group.column(number).statistics
        is_never_null = statistics is not None and statistics.null_count == 0
        names = [name for name in prefix.split(".") if name not in LIST_NAMES]
        if (
            last_name == "bytes"
            and f"{prefix}.path" in paths
            and is_never_null
            and _is_image_struct(schema, names)
        ):
            omitted.append(names)
        else:
            kept.append(path)
    return kept, omitted


def _is_image_struct(schema: Schema, names: list[str]) -> bool:
    """Tell whether a path of names leads to a mapping of bytes and path, lists passed through."""
    import pyarrow.types as kinds

    kind: DataType | None = None
    for name in names:
        fields: Any = schema if kind is None else kind
        if kind is not None and not kinds.is_struct(kind):
            return False
        if fields.get_field_index(name) < 0:
            return False
        kind = fields.field(name).type
        while kinds.is_list(kind) or kinds.is_large_list(kind):
            kind = kind.value_type
    return kind is not None and kinds.is_struct(kind)
