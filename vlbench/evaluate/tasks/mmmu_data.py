"""MMMU's questions (arXiv:2311.16502), in the layout of the hub's MMMU/MMMU or lmms-lab/MMMU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from vlbench.evaluate.tasks.cells import answer_of, options_of, picture_of
from vlbench.evaluate.tasks.files import arranged, chosen, find, rows
from vlbench.evaluate.tasks.record import Record
from vlbench.evaluate.tasks.subjects import subject_of

SUBJECTS = (
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
NEEDED = ("id", "question", "options", "question_type", "image_1")
PICTURE = re.compile(r"image_\d+")
WANTED = rf"{'|'.join(NEEDED)}|answer|{PICTURE.pattern}"


def read(path: str, split: str, subjects: Sequence[str] | None = None) -> list[Record]:
    """Return the questions of a split, subject by subject, each in the order of the data.

    `path` is a folder, a file or a hub id; `subjects` (default: all) are of SUBJECTS. Raises a
    Mistake when they cannot be found or read.
    """
    wanted = chosen(subjects, {name: name for name in SUBJECTS}, "subject of MMMU")
    found = find(path, split)
    records = []
    for file in found.files:
        if file.parent.name in SUBJECTS and file.parent.name not in wanted:
            continue  # not read at all
        for row in rows(file, NEEDED, WANTED):
            if not subjects or subject_of(str(row["id"])) in wanted:
                records.append(_record(row))
    asked = wanted if subjects else ()
    return arranged(records, found, SUBJECTS, lambda record: record.subject, asked)


def _record(row: dict[str, Any]) -> Record:
    name = str(row["id"])
    columns = sorted(filter(PICTURE.fullmatch, row), key=lambda column: int(column[6:]))
    pictures = {column: picture_of(row[column], name, ()) for column in columns}
    return Record(
        id=name,
        task="mmmu",
        subject=subject_of(name),
        category="",
        type=str(row["question_type"]),
        question=str(row["question"]),
        options=options_of(row["options"], name),
        answer=answer_of(row.get("answer")),
        pictures={column: one for column, one in pictures.items() if one},
    )
