"""How far `pack` has come, beside the shards that are finished, so that it can go on after a stop.

progress.jsonl    a line about the data and the settings, then a line for each finished shard
left_out.jsonl    a line for each bad sample before them
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlbench.errors import BadSample, UserError
from vlbench.text_files import (
    append_json_lines,
    format_json_lines,
    read_json_lines,
    write_atomically,
)

PROGRESS_FILE = "progress.jsonl"
LEFT_OUT_FILE = "left_out.jsonl"


class PackProgress:
    """The finished shards in a folder, and the bad samples before their end."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Read how far these data were packed; shards of others or unfinished ones are removed."""
        self.folder = folder
        self.shards: list[dict[str, Any]] = []
        """File, samples and bytes of each."""
        self.next_index = 0
        """The record (from 0) to go on with."""
        self.left_out_count = 0
        """Bad samples before it."""
        self.first_left_out: BadSample | None = None
        self.dropped_keys: set[str] = set()
        """Keys of the records packed now that shards do not have."""
        self.dropped_turn_keys: set[str] = set()
        """Keys of their turns, likewise, as `turn KEY`."""
        lines = _read_finished(folder)
        if lines and lines[0] == settings:
            for line in lines[1:]:
                self._take_line(line)
        left_out = _read_lines(folder / LEFT_OUT_FILE)[: self.left_out_count]
        self._note_first([BadSample(str(bad["id"]), str(bad["reason"])) for bad in left_out[:1]])
        known = {str(shard["file"]) for shard in self.shards} | {PROGRESS_FILE, LEFT_OUT_FILE}
        for file in folder.iterdir():
            if file.name.removesuffix(".index") not in known:
                file.unlink()
        write_atomically(folder / LEFT_OUT_FILE, format_json_lines(left_out))
        kept = lines[1 : 1 + len(self.shards)]
        write_atomically(folder / PROGRESS_FILE, format_json_lines([settings, *kept]))

    def _take_line(self, line: dict[str, Any]) -> None:
        self.shards.append(line["shard"])
        self.next_index, self.left_out_count = line["next_index"], line["left_out"]

    def _note_first(self, bad_samples: Sequence[BadSample]) -> None:
        self.first_left_out = self.first_left_out or next(iter(bad_samples), None)

    def add_left_out(self, bad_samples: Sequence[BadSample]) -> None:
        """Write down the bad samples before the end of the shard that is finished next."""
        lines = ({"id": bad.sample_id, "reason": bad.reason} for bad in bad_samples)
        append_json_lines(self.folder / LEFT_OUT_FILE, lines)
        self.left_out_count += len(bad_samples)
        self._note_first(bad_samples)

    def add_shard(self, shard: dict[str, Any], next_index: int) -> None:
        """Write down that a shard is finished, and with which record to go on."""
        self.next_index = next_index
        self.shards.append(shard)
        line = {"shard": shard, "next_index": next_index, "left_out": self.left_out_count}
        append_json_lines(self.folder / PROGRESS_FILE, [line])

    def finish(self) -> None:
        """Remove what tells of the progress: all shards are finished."""
        (self.folder / PROGRESS_FILE).unlink()


def holds_finished_shards(folder: Path) -> bool:
    """Tell whether a folder has at least one shard with which a `pack` could go on."""
    return len(_read_finished(folder)) > 1


def _read_finished(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of the progress whose shards are whole."""
    lines = _read_lines(folder / PROGRESS_FILE)
    for number, line in enumerate(lines[1:], start=1):
        shard: dict[str, Any] = line.get("shard") or {}
        file = folder / str(shard.get("file"))
        if not file.is_file() or file.stat().st_size != shard.get("bytes"):
            return lines[:number]
    return lines


def _read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a file, [] for one that is missing or damaged."""
    try:
        return read_json_lines(file)
    except UserError:
        return []
