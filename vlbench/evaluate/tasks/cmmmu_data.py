"""CMMMU's questions (arXiv:2401.11944), in the layouts of the hub or in that of its GitHub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlbench.evaluate.tasks.benchmark_files import (
    find_split,
    order_records,
    read_rows,
    select_subjects,
)
from vlbench.evaluate.tasks.benchmark_types import BenchmarkRecord, RecordImage
from vlbench.evaluate.tasks.record_fields import parse_answer, parse_image

CMMMU_CATEGORIES = {
    "art_and_design": "艺术与设计",
    "business": "商业",
    "science": "科学",
    "health_and_medicine": "健康与医学",
    "humanities_and_social_sciences": "人文社会科学",
    "technology_and_engineering": "技术与工程",
}
"""Names of folders and configurations, and as the records have them; in the benchmark's order."""
CHOICE_TYPE, JUDGEMENT_TYPE, GAP_TYPE = "选择", "判断", "填空"
REQUIRED_COLUMNS = ("id", "type", "question", "category", "subcategory")
OPTION_COLUMNS = ("option1", "option2", "option3", "option4")
IMAGE_COLUMN = re.compile(r"image_\d+")
COLUMN_PATTERN = (
    rf"{'|'.join(REQUIRED_COLUMNS)}|option\d|answer|img_list|{IMAGE_COLUMN.pattern}(_filename)?"
)


def read_records(
    path: str, split: str, subjects: Sequence[str] | None = None
) -> list[BenchmarkRecord]:
    """Return the questions of a split, category by category, each in the order of the data.

    `path` is a folder, a file or a hub id; `subjects` (default: all) are categories, in either
    spelling of CATEGORIES. Raises a Mistake when they cannot be found or read.
    """
    known = CMMMU_CATEGORIES | {name: name for name in CMMMU_CATEGORIES.values()}
    wanted = select_subjects(subjects, known, "category of CMMMU")
    found = find_split(path, split)
    records = []
    for file in found.files:
        if (
            file.parent.name in CMMMU_CATEGORIES
            and CMMMU_CATEGORIES[file.parent.name] not in wanted
        ):
            continue  # not read at all
        for row in read_rows(file, REQUIRED_COLUMNS, COLUMN_PATTERN):
            if not subjects or row["category"] in wanted:
                records.append(_record_from_row(row, file.parent))
    order, asked = tuple(CMMMU_CATEGORIES.values()), wanted if subjects else ()
    return order_records(records, found, order, lambda record: record.category, asked)


def _record_from_row(row: dict[str, Any], folder: Path) -> BenchmarkRecord:
    name = str(row["id"])
    pictures = (
        _listed_images(row, name, folder) if "img_list" in row else _images_in_columns(row, name)
    )
    options = [row.get(option) for option in OPTION_COLUMNS] if row["type"] == CHOICE_TYPE else []
    return BenchmarkRecord(
        id=name,
        task="cmmmu",
        subject=str(row["subcategory"]),
        category=str(row["category"]),
        type=str(row["type"]),
        question=str(row["question"]),
        options=tuple(str(option) for option in options if option is not None),
        answer=parse_answer(row.get("answer")),
        images={one.file_name: one for one in pictures},
    )


def _images_in_columns(row: dict[str, Any], record_id: str) -> list[RecordImage]:
    """Return the pictures in the columns of a record; their order differs from set to set."""
    columns = sorted(filter(IMAGE_COLUMN.fullmatch, row), key=lambda column: int(column[6:]))
    cells = ((row[column], row.get(f"{column}_filename")) for column in columns)
    found = (parse_image(cell, record_id, (file,)) for cell, file in cells)
    return [picture for picture in found if picture]


def _listed_images(row: dict[str, Any], record_id: str, folder: Path) -> list[RecordImage]:
    """Return the pictures that a record lists, files beside it; a missing one has no bytes."""
    files = [(str(file), folder / str(file)) for file in row["img_list"] or ()]
    return [
        RecordImage(record_id, file, at.read_bytes() if at.is_file() else b"") for file, at in files
    ]
