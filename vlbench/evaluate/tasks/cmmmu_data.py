"""CMMMU's questions (arXiv:2401.11944), in the layouts of the hub or in that of its GitHub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlbench.evaluate.tasks.cells import answer_of, picture_of
from vlbench.evaluate.tasks.files import arranged, chosen, find, rows
from vlbench.evaluate.tasks.record import Packed, Record

CATEGORIES = {
    "art_and_design": "艺术与设计",
    "business": "商业",
    "science": "科学",
    "health_and_medicine": "健康与医学",
    "humanities_and_social_sciences": "人文社会科学",
    "technology_and_engineering": "技术与工程",
}
"""Names of folders and configurations, and as the records have them; in the benchmark's order."""
CHOICE, JUDGE, FILL = "选择", "判断", "填空"
NEEDED = ("id", "type", "question", "category", "subcategory")
OPTIONS = ("option1", "option2", "option3", "option4")
PICTURE = re.compile(r"image_\d+")
WANTED = rf"{'|'.join(NEEDED)}|option\d|answer|img_list|{PICTURE.pattern}(_filename)?"


def read(path: str, split: str, subjects: Sequence[str] | None = None) -> list[Record]:
    """Return the questions of a split, category by category, each in the order of the data.

    `path` is a folder, a file or a hub id; `subjects` (default: all) are categories, in either
    spelling of CATEGORIES. Raises a Mistake when they cannot be found or read.
    """
    known = CATEGORIES | {name: name for name in CATEGORIES.values()}
    wanted = chosen(subjects, known, "category of CMMMU")
    found = find(path, split)
    records = []
    for file in found.files:
        if file.parent.name in CATEGORIES and CATEGORIES[file.parent.name] not in wanted:
            continue  # not read at all
        for row in rows(file, NEEDED, WANTED):
            if not subjects or row["category"] in wanted:
                records.append(_record(row, file.parent))
    order, asked = tuple(CATEGORIES.values()), wanted if subjects else ()
    return arranged(records, found, order, lambda record: record.category, asked)


def _record(row: dict[str, Any], folder: Path) -> Record:
    name = str(row["id"])
    pictures = _listed(row, name, folder) if "img_list" in row else _packed(row, name)
    options = [row.get(option) for option in OPTIONS] if row["type"] == CHOICE else []
    return Record(
        id=name,
        task="cmmmu",
        subject=str(row["subcategory"]),
        category=str(row["category"]),
        type=str(row["type"]),
        question=str(row["question"]),
        options=tuple(str(option) for option in options if option is not None),
        answer=answer_of(row.get("answer")),
        pictures={one.file: one for one in pictures},
    )


def _packed(row: dict[str, Any], name: str) -> list[Packed]:
    """Return the pictures in the columns of a record; their order differs from set to set."""
    columns = sorted(filter(PICTURE.fullmatch, row), key=lambda column: int(column[6:]))
    cells = ((row[column], row.get(f"{column}_filename")) for column in columns)
    found = (picture_of(cell, name, (file,)) for cell, file in cells)
    return [picture for picture in found if picture]


def _listed(row: dict[str, Any], name: str, folder: Path) -> list[Packed]:
    """Return the pictures that a record lists, files beside it; a missing one has no bytes."""
    files = [(str(file), folder / str(file)) for file in row["img_list"] or ()]
    return [Packed(name, file, at.read_bytes() if at.is_file() else b"") for file, at in files]
