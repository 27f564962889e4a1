"""Files of recipes by name, those of `./recipes` before the shipped ones."""

from __future__ import annotations

import re
from pathlib import Path

from vlbench.connector.folder_modules import shipped_folder
from vlbench.errors import UserError
from vlbench.text_files import read_text


def recipe_files(folder: str = ".") -> dict[str, Path]:
    """Return the recipes by name, or the files of a `folder` of recipes."""
    files: dict[str, Path] = {}
    for root in (Path("recipes"), shipped_folder("recipes")):
        for path in sorted((root / folder).glob("*.yaml")):
            files.setdefault(path.stem, path)
    return files


def size_files() -> dict[str, Path]:
    """Return the sizes by name."""
    return recipe_files("size")


def data_files(line: re.Pattern[str], takes_unreadable: bool) -> dict[str, Path]:
    """Return the files on data by name that have a `line`, and perhaps those that cannot be read.

    Mixtures and mappings of annotation files lie in one folder, and differ in a key.
    """

    def has_line(file: Path) -> bool:
        try:
            return bool(line.search(read_text(file)))
        except UserError:
            return takes_unreadable

    return {name: file for name, file in recipe_files("data").items() if has_line(file)}
