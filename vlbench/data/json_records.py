"""Conversations in a JSON file: a list of records, or a record per line. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlbench.data.json_scan import scan_json
from vlbench.data.record_files import RECORD_DECODER, AnyOrder, read_range
from vlbench.data.record_offsets import find_offsets
from vlbench.errors import UserError


class JsonRecords(AnyOrder):
    """The records of a JSON file, each parsed when it is asked for.

    The file is searched once, when it is opened, and not kept in memory (`record_offsets`).
    """

    def __init__(self, file: Path) -> None:
        """Find the records; raises OSError, and a UserError with line and column."""
        self.name, self.folder = str(file), file.parent
        self.offsets = find_offsets(file, "json", scan_json)
        self.stamps = [self.offsets.stamp]

    def __len__(self) -> int:
        return len(self.offsets)

    def read_record(self, index: int, with_images: bool = True) -> Any:
        """Return record `index` (from 0); a UserError if the file is another one by now."""
        start, end = self.offsets.record_range(index)
        data = read_range(self.name, self.offsets.stamp, start, end)
        try:
            return RECORD_DECODER.raw_decode(data.decode("utf-8"))[0]
        except UserError:
            raise
        except (ValueError, RecursionError) as error:
            index_file = self.offsets.index_file
            remedy = f"; remove {index_file}, and it is made anew" if index_file else ""
            raise UserError(f"{self.name}: no record begins at byte {start}{remedy}") from error
