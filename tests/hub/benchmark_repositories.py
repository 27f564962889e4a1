"""MMMU and CMMMU as the hub has them: a folder per subject or category, a parquet file per split.

The subjects of the recorded sets are those sets; of each other one there is one question per split.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

GOLDENS = Path(__file__).parent.parent / "goldens/evaluation"


def write_mmmu(folder: Path) -> None:
    """Write MMMU/MMMU: 30 subjects with the splits dev, validation and test."""
    from vlbench.evaluate.tasks.benchmark_types import MMMU_SUBJECTS

    (folder / "README.md").write_text("# MMMU\n")
    shutil.copytree(GOLDENS / "mmmu_tiny", folder, dirs_exist_ok=True)
    for subject in MMMU_SUBJECTS:
        if not (folder / subject).is_dir():
            for split in ("dev", "validation", "test"):
                told = {"id": f"{split}_{subject}_1"}
                _copy_question(folder / "Art", folder / subject, split, told)


def write_cmmmu(folder: Path) -> None:
    """Write m-a-p/CMMMU: six categories with the splits dev, val and test."""
    from vlbench.evaluate.tasks.benchmark_types import CMMMU_CATEGORIES

    (folder / "README.md").write_text("# CMMMU\n")
    shutil.copytree(GOLDENS / "cmmmu_tiny", folder, dirs_exist_ok=True)
    for number, (name, category) in enumerate(CMMMU_CATEGORIES.items()):
        if not (folder / name).is_dir():
            for place, split in enumerate(("dev", "val", "test")):
                told = {"id": str(90000 + 10 * number + place), "category": category}
                _copy_question(folder / "science", folder / name, split, told)


def _copy_question(source: Path, target: Path, split: str, new_columns: dict[str, Any]) -> None:
    """Write the first question of a split in `source` into `target`, with `new_columns`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = f"{split}-00000-of-00001.parquet"
    table = pq.read_table(source / name).slice(0, 1)
    for column, value in new_columns.items():
        place = table.column_names.index(column)
        kind = table.schema.field(column).type
        table = table.set_column(place, column, pa.array([value], kind))
    target.mkdir(exist_ok=True)
    pq.write_table(table, target / name)
