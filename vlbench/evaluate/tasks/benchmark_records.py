"""MMMU's (arXiv:2311.16502) and CMMMU's (arXiv:2401.11944) questions, read into records.

MMMU in the layout of the hub's MMMU/MMMU or lmms-lab/MMMU, CMMMU in that of the hub or of its
GitHub repository.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from vlbench.data.image_processing import ImageFile
from vlbench.errors import UserError
from vlbench.evaluate.tasks.benchmark_files import (
    find_split,
    order_records,
    read_rows,
    select_subjects,
)
from vlbench.evaluate.tasks.benchmark_types import (
    CMMMU_CATEGORIES,
    CMMMU_CHOICE_TYPE,
    MMMU_SUBJECTS,
    BenchmarkRecord,
    RecordImage,
    subject_of_id,
)
from vlbench.process_settings import ignore_thread_warnings

IMAGE_COLUMN = re.compile(r"image_\d+")
MMMU_REQUIRED_COLUMNS = ("id", "question", "options", "question_type", "image_1")
MMMU_COLUMN_PATTERN = rf"{'|'.join(MMMU_REQUIRED_COLUMNS)}|answer|{IMAGE_COLUMN.pattern}"
CMMMU_REQUIRED_COLUMNS = ("id", "type", "question", "category", "subcategory")
CMMMU_OPTION_COLUMNS = ("option1", "option2", "option3", "option4")
CMMMU_COLUMN_PATTERN = (
    rf"{'|'.join(CMMMU_REQUIRED_COLUMNS)}|option\d|answer|img_list"
    rf"|{IMAGE_COLUMN.pattern}(_filename)?"
)
WITHHELD_ANSWERS = (None, "", "?")  # answers of test splits


def read_mmmu_records(
    source: str, split: str, subjects: Sequence[str] | None = None
) -> list[BenchmarkRecord]:
    """Return the questions of a split, subject by subject, each in the order of the data.

    `source` is a folder, a file or a hub id; `subjects` (default: all) are of MMMU_SUBJECTS. Raises
    a UserError when they cannot be found or read.
    """
    wanted = select_subjects(subjects, {name: name for name in MMMU_SUBJECTS}, "subject of MMMU")
    split_files = find_split(source, split)
    records = []
    for file in split_files.files:
        if file.parent.name in MMMU_SUBJECTS and file.parent.name not in wanted:
            continue  # a folder of another subject is not even read
        for row in read_rows(file, MMMU_REQUIRED_COLUMNS, MMMU_COLUMN_PATTERN):
            if not subjects or subject_of_id(str(row["id"])) in wanted:
                records.append(_mmmu_record(row))
    required = wanted if subjects else ()
    return order_records(
        records, split_files, MMMU_SUBJECTS, lambda record: record.subject, required
    )


def _mmmu_record(row: dict[str, Any]) -> BenchmarkRecord:
    record_id = str(row["id"])
    images = {column: parse_image(row[column], record_id, ()) for column in _image_columns(row)}
    return BenchmarkRecord(
        id=record_id,
        task="mmmu",
        subject=subject_of_id(record_id),
        category="",
        type=str(row["question_type"]),
        question=str(row["question"]),
        options=parse_options(row["options"], record_id),
        answer=parse_answer(row.get("answer")),
        images={column: image for column, image in images.items() if image},
    )


def read_cmmmu_records(
    source: str, split: str, subjects: Sequence[str] | None = None
) -> list[BenchmarkRecord]:
    """Return the questions of a split, category by category, each in the order of the data.

    `source` is a folder, a file or a hub id; `subjects` (default: all) are categories, in either
    spelling of CMMMU_CATEGORIES. Raises a UserError when they cannot be found or read.
    """
    known = CMMMU_CATEGORIES | {name: name for name in CMMMU_CATEGORIES.values()}
    wanted = select_subjects(subjects, known, "category of CMMMU")
    split_files = find_split(source, split)
    records = []
    for file in split_files.files:
        category = CMMMU_CATEGORIES.get(file.parent.name)
        if category and category not in wanted:
            continue  # a folder of another category is not even read
        for row in read_rows(file, CMMMU_REQUIRED_COLUMNS, CMMMU_COLUMN_PATTERN):
            if not subjects or row["category"] in wanted:
                records.append(_cmmmu_record(row, file.parent))
    order, required = tuple(CMMMU_CATEGORIES.values()), wanted if subjects else ()
    return order_records(records, split_files, order, lambda record: record.category, required)


def _cmmmu_record(row: dict[str, Any], folder: Path) -> BenchmarkRecord:
    record_id = str(row["id"])
    images = (
        _listed_images(row, record_id, folder)
        if "img_list" in row
        else _images_in_columns(row, record_id)
    )
    has_options = row["type"] == CMMMU_CHOICE_TYPE
    options = [row.get(column) for column in CMMMU_OPTION_COLUMNS] if has_options else []
    return BenchmarkRecord(
        id=record_id,
        task="cmmmu",
        subject=str(row["subcategory"]),
        category=str(row["category"]),
        type=str(row["type"]),
        question=str(row["question"]),
        options=tuple(str(option) for option in options if option is not None),
        answer=parse_answer(row.get("answer")),
        images={image.file_name: image for image in images},
    )


def _image_columns(row: dict[str, Any]) -> list[str]:
    """Return the names of the image columns by their numbers; their order varies in the data."""
    return sorted(filter(IMAGE_COLUMN.fullmatch, row), key=lambda column: int(column[6:]))


def _images_in_columns(row: dict[str, Any], record_id: str) -> list[RecordImage]:
    """Return the images in the columns of a record."""
    images = (
        parse_image(row[column], record_id, (row.get(f"{column}_filename"),))
        for column in _image_columns(row)
    )
    return [image for image in images if image]


def _listed_images(row: dict[str, Any], record_id: str, folder: Path) -> list[RecordImage]:
    """Return the images that a record lists, files of `folder`; a missing one has no bytes."""
    files = [
        (str(name), ImageFile(folder / str(name), str(folder))) for name in row["img_list"] or ()
    ]
    return [
        RecordImage(record_id, name, file.read_bytes() if Path(file.path).exists() else b"")
        for name, file in files
    ]


RECORD_READERS: dict[str, Callable[[str, str, Sequence[str] | None], list[BenchmarkRecord]]] = {
    "mmmu": read_mmmu_records,
    "cmmmu": read_cmmmu_records,
}
"""By task: a function of source, split and subjects."""


def parse_literal(text: str) -> Any:
    """Return the value of a Python literal, None for a text that is none."""
    with ignore_thread_warnings():  # Python warns of escapes like \f in "\frac"
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return None


def parse_options(cell: Any, record_id: str) -> tuple[str, ...]:
    """Return the options of a cell: a list, or a text that is a list in Python's notation.

    Raises a UserError that names the record where it is neither.
    """
    value = parse_literal(cell) if isinstance(cell, str) else cell
    if not isinstance(value, list | tuple):
        given = f"{cell!r:.100}"
        raise UserError(
            f"record {record_id}: its options are {given}; wanted is a list as in Python"
        )
    return tuple(str(option) for option in value)


def parse_answer(cell: Any) -> str | tuple[str, ...] | None:
    """Return the answer of a cell, None where it is withheld.

    Several right answers are a list, or a text that is a list of texts in Python's notation; a list
    of numbers in a text, like [0, 1], is an interval or a vector and stays a text.
    """
    if isinstance(cell, list | tuple):
        return tuple(str(answer) for answer in cell)
    if cell in WITHHELD_ANSWERS:
        return None
    is_list_text = isinstance(cell, str) and cell.lstrip().startswith("[")
    answers = parse_literal(cell) if is_list_text else None
    if answers and isinstance(answers, list) and all(isinstance(one, str) for one in answers):
        return tuple(answers)
    return str(cell)


def parse_image(cell: Any, record_id: str, file_names: Iterable[str | None]) -> RecordImage | None:
    """Return the image of a cell, None for an empty one.

    A cell holds the bytes of a file, alone or with its path. The image's name is the first of
    `file_names` that is not empty, else the one in the path. A name without bytes is a missing
    image, which is an error when it is opened.
    """
    cell = cell if isinstance(cell, dict) else {"bytes": cell}
    path = cell.get("path")
    name = next(filter(None, file_names), None) or (PurePosixPath(path).name if path else "")
    if cell.get("bytes") is None and not name:
        return None
    return RecordImage(record_id, name, cell.get("bytes") or b"")
