"""What to say of a location that is no data: a name that is not there, a folder of other files."""

from __future__ import annotations

from pathlib import Path

from vlbench.errors import UserError, suggest_name
from vlbench.text_tables import list_some

RECORD_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
"""Names that a message suggests; what a file holds tells its format."""
PATTERN_SIGNS = "*?["
MAX_NAMED_FILES = 5


def missing_file_error(file: Path) -> UserError:
    """Return the error for a file that is not there, with the name most like it."""
    problem = f"data {file}: there is no such file"
    if any(sign in file.name for sign in PATTERN_SIGNS):
        return UserError(
            f"{problem}; a pattern may name tar files alone: give the folder of Parquet files, and "
            "other files one by one in data.mix"
        )
    if not file.parent.is_dir():
        return UserError(f"{problem}, and no folder {file.parent}")
    files = [path.name for path in file.parent.iterdir() if _may_have_records(path)]
    return UserError(f"{problem}.{suggest_name(file.name, files)}")


def folder_remedy(folder: Path) -> str:
    """Return what to give instead of a folder that is no data, by the files that it holds."""
    names = sorted(path.name for path in folder.iterdir())
    if any(name.endswith(".arrow") for name in names):
        return (
            "it holds Arrow files, as save_to_disk writes them: write its rows as Parquet files "
            "(to_parquet) or JSON records"
        )
    if any(name.lower().endswith(".tar") for name in names):
        return f"it holds tar files: give {folder}/*.tar"
    files = [str(folder / name) for name in names if _may_have_records(folder / name)]
    if not files:
        return "it holds no file of JSON, Parquet or a table, nor tar files"
    several = "one of its files, or several in data.mix" if len(files) > 1 else "its file"
    return f"give {several}: {list_some(files, MAX_NAMED_FILES)}"


def _may_have_records(path: Path) -> bool:
    return path.suffix.lower() in RECORD_SUFFIXES
