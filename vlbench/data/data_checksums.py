"""What the data of a run held, as checksums: the same path may hold other records tomorrow."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlbench.data.annotation_records import AnnotationRecords
from vlbench.data.chosen_samples import base_source
from vlbench.data.conversation_files import ConversationFiles
from vlbench.data.parquet_records import ParquetRecords
from vlbench.data.remote_shards import shown_name
from vlbench.data.sample import SampleSource
from vlbench.data.shards import WebDatasetShards
from vlbench.errors import UserError
from vlbench.regular_files import open_regular
from vlbench.text_files import read_json

CHECKSUMS_KEY = "data"  # of versions.json: path of data -> checksum
STAMPS_KEY = "data_stamps"  # of versions.json: path of data -> size and time of each file
STEPS_KEY = "stage_steps"  # of versions.json: stage -> optimizer steps, which data may decide
ORDERS_KEY = "stage_orders"  # of versions.json: stage -> ORDER_VERSION, of shards and Parquet files
DATA_KEYS = (CHECKSUMS_KEY, STAMPS_KEY, STEPS_KEY, ORDERS_KEY)


def checksum_sources(sources: Iterable[SampleSource]) -> dict[str, str]:
    """Return path -> checksum of sources that are read from files, images left out.

    Of shards and Parquet files, which may hold terabytes, names and numbers of samples are what is
    summed.
    """
    return {
        source.name: _checksum_source(source)
        for source in map(base_source, sources)
        if isinstance(source, ConversationFiles | WebDatasetShards)
    }


def stamp_sources(sources: Iterable[SampleSource]) -> dict[str, list[list[int]]]:
    """Return path -> size and modification time (ns) of the files that a source is read from.

    While they are the same, so is its checksum. Shards are left out: theirs costs nothing.
    """
    return {
        source.name: [list(stamp) for stamp in source.records.stamps]
        for source in map(base_source, sources)
        if isinstance(source, ConversationFiles)
    }


def _checksum_source(source: ConversationFiles | WebDatasetShards) -> str:
    if isinstance(source, WebDatasetShards):
        names = [shown_name(str(tar)).rpartition("/")[2] for tar in source.tars]
        return _checksum_list([names, [int(count) for count in source.sample_counts]])
    if isinstance(source.records, ParquetRecords):
        blocks = source.records.blocks
        return _checksum_list(
            [[block.file.name, block.stamp[0], block.row_count] for block in blocks]
        )
    if isinstance(source.records, AnnotationRecords):
        files = [_checksum_file(file) for file in source.records.files]
        return _checksum_list([source.records.mapping.digest(), source.records.split, *files])
    return _checksum_file(Path(source.records.name))


def _checksum_file(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum_list(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def data_checksums(versions_file: Path) -> dict[str, str]:
    """Return the checksums that a run recorded, {} where it has none."""
    recorded = read_json(versions_file).get(CHECKSUMS_KEY, {}) if versions_file.is_file() else {}
    if not isinstance(recorded, dict):
        raise UserError(f"{versions_file}: {CHECKSUMS_KEY} is no mapping of paths to checksums")
    return {str(path): str(checksum) for path, checksum in recorded.items()}
