"""Conversations in JSON files: a list of records, or a record per line. Imports no torch."""

from __future__ import annotations

import json
import os
from codecs import BOM_UTF8
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlbench.data.conversation_record import TURN_KEYS, sample_from_record
from vlbench.data.image_processing import ImageFile
from vlbench.data.sample import LazyImage, Sample, sample_at
from vlbench.errors import BadSample, UserError, describe_json_type, suggest_name
from vlbench.regular_files import MAX_DATA_BYTES, open_regular, read_regular_text
from vlbench.text_files import LFS_POINTER

MAX_FILE_CHECKS = 100_000  # image files whose existence is checked
SIGNATURE_BYTES = 1 << 16  # of the beginning, in which a foreign format is looked for
JSONL_SUFFIXES = (".jsonl", ".ndjson")  # endings of files with one record per line
FOREIGN_SIGNATURES = {
    b"PAR1": "is a Parquet file; write its rows as JSON records first (pandas.read_parquet)",
    b"\x1f\x8b": "is compressed (gzip); decompress it first",
    b"PK\x03\x04": "is a zip file; unpack it first",
    b"ARROW1": "is an Arrow file; write its rows as JSON records first (pandas.read_feather)",
    b"BZh": "is compressed (bzip2); decompress it first",
    b"\xfd7zXZ\x00": "is compressed (xz); decompress it first",
    b"\x28\xb5\x2f\xfd": "is compressed (zstd); decompress it first",
    b"\x80": "is a pickle or another binary file; write its records as JSON",
    b"\x89PNG": "is an image; expected records in JSON",
    b"\xff\xd8\xff": "is an image; expected records in JSON",
    b"<": "begins as a web page (HTML or XML), not as JSON; was it downloaded by its raw address?",
    LFS_POINTER: "is a Git-LFS pointer and not the file; run git lfs pull",
}
"""How files that are not JSON begin."""


class LlavaJson:
    """The samples of a file in LLaVA's format (JSON, or JSONL with one record per line).

    Records stay as they were parsed; a record is converted when its sample is requested. Reports
    count records from 1. `<image>` in a human turn becomes IMAGE_PLACEHOLDER.
    """

    def __init__(
        self,
        file: str | Path,
        image_folder: str | Path | None = None,
        allow_outside: bool = False,
    ) -> None:
        """Read `file`; its image names are looked up in `image_folder` (default: its own folder).

        Images outside of that folder are bad, unless `allow_outside`; see `image_folder.is_inside`.
        Raises a UserError when the file is missing, malformed or without records.
        """
        self.name = str(file)
        self.image_folder = Path(image_folder) if image_folder is not None else Path(file).parent
        if not self.image_folder.is_dir():
            raise UserError(f"images: there is no folder {self.image_folder}")
        self.allow_outside = allow_outside
        self.records = read_records(Path(file))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        """Return the sample of record `index` (from 0), or raise BadSample."""
        return sample_from_record(
            self.records[index],
            f"record {index + 1}",
            self._find_image,
        )

    def _find_image(self, name: str) -> ImageFile:
        path = str(self.image_folder / name)
        return ImageFile(path, str(self.image_folder), self.allow_outside)

    def find_bad_samples(
        self, on_sample: Callable[[Sample], None] | None = None
    ) -> list[BadSample]:
        """Return every record that is malformed or names an image file that may not be read.

        That is one that does not exist, or is outside of the folder.

        At most MAX_FILE_CHECKS different files are looked up. `on_sample` is called with every
        well-formed sample.
        """
        faults: list[BadSample] = []
        problems: dict[LazyImage, str] = {}
        for index in range(len(self)):
            try:
                sample = sample_at(self, index)
            except BadSample as fault:
                faults.append(fault)
                continue
            if on_sample:
                on_sample(sample)
            for image in sample.images:
                if image not in problems and len(problems) < MAX_FILE_CHECKS:
                    problems[image] = _find_problem(image)
                if problems.get(image):
                    faults.append(BadSample(sample.id, problems[image]).with_origin_of(sample))
                    break
        return faults


def _find_problem(image: LazyImage) -> str:
    """Return why an image file may not be read, "" if it may; it is not opened."""
    if isinstance(image, ImageFile):
        try:
            image.refuse_outside()
        except UserError as error:
            return str(error)
    return "" if os.path.exists(image.name) else f"image {image.name}: does not exist"


def read_records(file: Path) -> list[Any]:
    """Parse a JSON list, or JSONL when the file's name ends in .jsonl.

    Raises a UserError with file, line and column.
    """
    text = _read_text(file)
    if not text.strip():
        raise UserError(f"data {file}: the file is empty; expected a JSON list of records")
    if file.suffix.lower() in JSONL_SUFFIXES:
        lines = enumerate(text.split("\n"), start=1)
        return [_parse_json(line, file, number) for number, line in lines if line.strip()]
    records = _parse_json(text, file)
    if not isinstance(records, list):
        raise UserError(
            f"data {file}: line 1 holds {describe_json_type(records)}; expected a list of "
            f"records{_suggest_record_list(records)}"
        )
    if not records:
        raise UserError(f"data {file}: the list holds no records")
    return records


def _suggest_record_list(value: Any) -> str:
    """Suggest where the list of records may be in a mapping, or return an empty text."""
    if not isinstance(value, dict):
        return ""
    if any(key in value for key in TURN_KEYS):
        return "; is this one record? then write [ before it and ] behind it"
    list_keys = [key for key, entry in value.items() if isinstance(entry, list) and entry]
    record_keys = [key for key in list_keys if isinstance(value[key][0], dict)]
    if not record_keys:
        return ""
    longest = max(record_keys, key=lambda key: len(value[key]))
    return f"; {longest!r} holds a list of {len(value[longest])} mappings: save that list alone"


def _read_text(file: Path) -> str:
    try:
        with open_regular(file) as opened:
            beginning = opened.read(SIGNATURE_BYTES).removeprefix(BOM_UTF8).lstrip()
        for signature, problem in FOREIGN_SIGNATURES.items():
            if beginning.startswith(signature):
                raise UserError(problem)
        return read_regular_text(file, MAX_DATA_BYTES)
    except FileNotFoundError:
        suggestion = suggest_name(file.name, [p.name for p in file.parent.glob("*.json*")])
        raise UserError(f"data {file}: there is no such file.{suggestion}") from None
    except OSError as error:
        raise UserError(f"data {file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        start = error.object.rfind(b"\n", 0, error.start) + 1
        line = error.object.count(b"\n", 0, error.start) + 1
        where = f"line {line}, byte {error.start - start + 1}"
        raise UserError(f"data {file}: {where}: not UTF-8; save the file as UTF-8") from None
    except UserError as error:
        raise UserError(f"data {file}: {error}") from None


def _parse_json(text: str, file: Path, line_number: int | None = None) -> Any:
    """Parse JSON text; of a JSONL file it is the line `line_number`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {line_number or error.lineno}, column {error.colno}"
        reason = error.msg[:1].lower() + error.msg[1:]
        raise UserError(f"data {file}: {where}: {reason}{_format_hint(error, file)}") from None
    except ValueError as error:  # a number of more digits than Python converts
        raise UserError(f"data {file}: cannot be read as JSON ({error})") from None
    except RecursionError:
        raise UserError(f"data {file}: lists are nested too deeply; expected records") from None


def _format_hint(error: json.JSONDecodeError, file: Path) -> str:
    """Guess the format of a text that is not JSON, as the end of a message."""
    first_line = error.doc.lstrip().partition("\n")[0]
    if error.msg == "Extra data" and first_line.startswith("{"):
        return "; one record per line? then name the file .jsonl"
    is_table = file.suffix.lower() in (".csv", ".tsv") or (
        error.pos == error.doc.find(first_line)
        and first_line[:1].isalpha()
        and ("," in first_line or "\t" in first_line)
    )
    return "; a table (CSV)? write its rows as JSON records" if is_table else ""
