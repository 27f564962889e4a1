"""Samples of annotation files as records in LLaVA's format, each made when it is asked for."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlbench.data.annotation_index import NOT_FOUND, IndexRules, find_rows
from vlbench.data.annotation_mapping import FileRecords
from vlbench.data.box_texts import box_text
from vlbench.data.mapped_sources import MappedSource, locate_file
from vlbench.data.mapping_texts import (
    LinePattern,
    find_value,
    parse_template,
    plain_text,
    walk_together,
)
from vlbench.data.record_files import AnyOrder, file_stamp
from vlbench.data.record_places import REMEDY, RecordPlace
from vlbench.errors import BadSample, UserError

IMAGE_TAG = "<image>"


class AnnotationRecords(AnyOrder):
    """The samples of a data set in its own layout, by a mapping."""

    def __init__(self, name: str, source: MappedSource) -> None:
        """Find the samples; raises OSError, and a UserError for files that are not as declared."""
        self.name, self.folder, self.mapping = name, source.folder, source.mapping
        self.split = source.split
        self.texts = source.mapping.texts
        joins = source.mapping.join or {}
        records_file = self._locate(source.mapping.records)
        places = {
            name: _place_records(self._locate(one.file) if one.file else records_file, one)
            for name, one in joins.items()
        }
        self.joins = {name: (places[name], one.by, one.of) for name, one in joins.items()}
        self.records = _place_records(records_file, source.mapping)
        self.split_text = self._split_texts[0] if len(self._split_texts) == 1 else None
        rules = IndexRules(
            self.records,
            {path: self._wanted(texts) for path, texts in (source.mapping.where or {}).items()},
            source.mapping.each,
            source.mapping.turns,
            tuple(self.joins.values()),
        )
        self.rows = find_rows(rules)
        self.stamps = [*rules.stamps, file_stamp(source.file)]

    @property
    def files(self) -> list[Path]:
        """The annotation files, each once."""
        places = [self.records, *(place for place, _, _ in self.joins.values())]
        return list(dict.fromkeys(place.file for place in places))

    @property
    def _split_texts(self) -> tuple[str, ...]:
        return (self.mapping.splits or {}).get(self.split, ())

    def _wanted(self, texts: tuple[str, ...]) -> tuple[str, ...]:
        """Return texts of `where` with those of the split."""
        splits = self._split_texts or ("",)
        return tuple(
            dict.fromkeys(text.replace("{split}", one) for text in texts for one in splits)
        )

    def _locate(self, pattern: str) -> Path:
        """Return the file of a text with `{split}`."""
        values = {"split": self._split_texts[0]} if len(self._split_texts) == 1 else {}
        try:
            name = parse_template(pattern).fill(values)
        except BadSample as bad:
            raise UserError(f"the file '{pattern}' {bad.reason}") from None
        splits = self.mapping.splits or {}
        about = f"; split {self.split} of {', '.join(splits)}" if self.split else ""
        about += f"; from {self.mapping.get}" if self.mapping.get else ""
        return locate_file(self.folder, name, about)

    def __len__(self) -> int:
        return len(self.rows)

    def read_record(self, index: int, with_images: bool = True) -> Any:
        """Return sample `index` (from 0) as a record in LLaVA's format, or raise BadSample.

        A UserError if a file is another one by now.
        """
        try:
            return self._make_record(self._read_values(index))
        except BadSample as bad:
            raise BadSample(f"record {index + 1}", bad.reason) from bad

    def _read_values(self, index: int) -> ChainMap[str, Any]:
        """Return the keys of a sample's record, and before them the names of the mapping."""
        start, end, entry, *joined = self.rows.numbers[index].tolist()
        record = self.records.read_record(start, end)
        values = ChainMap({}, record)
        if self.split_text is not None:
            values["split"] = self.split_text
        for number, (name, (place, by, of)) in enumerate(self.joins.items()):
            first, last = joined[2 * number : 2 * number + 2]
            values[name] = _read_joined(record, place, by, of, first, last)
        if self.mapping.each:
            entries = list(walk_together(record, self.mapping.each))
            if not 0 <= entry < len(entries):
                raise UserError(f"{self.records.file}: has no entry {entry + 1}; {REMEDY}")
            return values.new_child(entries[entry])
        return values

    def _make_record(self, values: ChainMap[str, Any]) -> dict[str, Any]:
        record: dict[str, Any] = {}
        for key in ("id", "image"):
            if key in self.texts:
                record[key] = self._fill(key, values)
        turns: list[dict[str, str]] = []
        for entry in self._turn_entries(values):
            asked, answered = self._fill_turn(values.new_child(entry))
            if not turns:
                tag = IMAGE_TAG if "image" in record else ""
                asked = "\n".join(filter(None, (tag, asked, self._fill("instruction", values))))
            turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]
        return {**record, "conversations": turns}

    def _turn_entries(self, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the entries of the lists that are turns, or one without names."""
        if not self.mapping.turns:
            return [{}]
        entries = list(walk_together(values, self.mapping.turns))
        count = min(self.mapping.max_turns or len(entries), len(entries))
        return [entries[number * len(entries) // count] for number in range(count)]

    def _fill_turn(self, values: ChainMap[str, Any]) -> tuple[str, str]:
        if self.mapping.box is not None:
            values = values.new_child({"box": box_text(values, self.mapping.box)})
        return self._fill("question", values), self._fill("answer", values)

    def _fill(self, key: str, values: Mapping[str, Any]) -> str:
        """Return a text of the mapping, "" for one that it has not."""
        return self.texts[key].fill(values) if key in self.texts else ""


def _place_records(file: Path, declared: FileRecords) -> RecordPlace:
    pattern = LinePattern(declared.lines) if declared.lines is not None else None
    return RecordPlace(file, file_stamp(file), declared.at or "", pattern)


def _read_joined(
    record: Mapping[str, Any], place: RecordPlace, by: str, of: str, start: int, end: int
) -> dict[str, Any]:
    """Return the record of another list that belongs to a record; BadSample where there is none."""
    wanted = plain_text(find_value(record, of))
    joined = place.read_record(start, end) if start != NOT_FOUND else {}
    if not joined or plain_text(find_value(joined, by)) != wanted:  # else it has the same hash
        where = f"{place.at or 'a record'} in {place.file}"
        raise BadSample("", f"{of!r} is {wanted!r}, and no {by!r} of {where} is")
    return joined
