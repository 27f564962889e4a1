"""MMMU's questions (arXiv:2311.16502), in the layout of the hub's MMMU/MMMU or lmms-lab/MMMU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from vlbench.evaluate.tasks.benchmark_files import (
    find_split,
    order_records,
    read_rows,
    select_subjects,
)
from vlbench.evaluate.tasks.benchmark_types import BenchmarkRecord
from vlbench.evaluate.tasks.record_fields import parse_answer, parse_image, parse_options
from vlbench.evaluate.tasks.subject_domains import subject_of_id

MMMU_SUBJECTS = (
    "Accounting",
    "Agriculture",
    "Architecture_and_Engineering",
    "Art",
    "Art_Theory",
    "Basic_Medical_Science",
    "Biology",
    "Chemistry",
    "Clinical_Medicine",
    "Computer_Science",
    "Design",
    "Diagnostics_and_Laboratory_Medicine",
    "Economics",
    "Electronics",
    "Energy_and_Power",
    "Finance",
    "Geography",
    "History",
    "Literature",
    "Manage",
    "Marketing",
    "Materials",
    "Math",
    "Mechanical_Engineering",
    "Music",
    "Pharmacy",
    "Physics",
    "Psychology",
    "Public_Health",
    "Sociology",
)
"""In the order in which the benchmark's own scripts go through them."""
REQUIRED_COLUMNS = ("id", "question", "options", "question_type", "image_1")
IMAGE_COLUMN = re.compile(r"image_\d+")
COLUMN_PATTERN = rf"{'|'.join(REQUIRED_COLUMNS)}|answer|{IMAGE_COLUMN.pattern}"


def read_records(
    path: str, split: str, subjects: Sequence[str] | None = None
) -> list[BenchmarkRecord]:
    """Return the questions of a split, subject by subject, each in the order of the data.

    `path` is a folder, a file or a hub id; `subjects` (default: all) are of SUBJECTS. Raises a
    Mistake when they cannot be found or read.
    """
    wanted = select_subjects(subjects, {name: name for name in MMMU_SUBJECTS}, "subject of MMMU")
    found = find_split(path, split)
    records = []
    for file in found.files:
        if file.parent.name in MMMU_SUBJECTS and file.parent.name not in wanted:
            continue  # not read at all
        for row in read_rows(file, REQUIRED_COLUMNS, COLUMN_PATTERN):
            if not subjects or subject_of_id(str(row["id"])) in wanted:
                records.append(_record_from_row(row))
    asked = wanted if subjects else ()
    return order_records(records, found, MMMU_SUBJECTS, lambda record: record.subject, asked)


def _record_from_row(row: dict[str, Any]) -> BenchmarkRecord:
    name = str(row["id"])
    columns = sorted(filter(IMAGE_COLUMN.fullmatch, row), key=lambda column: int(column[6:]))
    pictures = {column: parse_image(row[column], name, ()) for column in columns}
    return BenchmarkRecord(
        id=name,
        task="mmmu",
        subject=subject_of_id(name),
        category="",
        type=str(row["question_type"]),
        question=str(row["question"]),
        options=parse_options(row["options"], name),
        answer=parse_answer(row.get("answer")),
        images={column: one for column, one in pictures.items() if one},
    )
