"""MAPPING:FOLDER, a data set whose annotation files are read by a mapping.

`data.train=vqav2:FOLDER` reads the files of FOLDER by the mapping `vqav2`. Mappings are found as
recipes are: `./recipes/data/NAME.yaml`, the shipped ones, or a file of any name. Imports no torch.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from vlbench.config.recipe_files import data_files
from vlbench.data.annotation_mapping import AnnotationMapping, read_mapping
from vlbench.data.parquet_files import iterate_parquet_files
from vlbench.errors import UserError, suggest_name

MAPPING_LINE = re.compile(r"^records\s*:", re.MULTILINE)
"""What a mapping has, and no other file of the folder: mixtures have sources."""
YAML_SUFFIXES = (".yaml", ".yml")


class MappedSource(NamedTuple):
    """A data set that a text names as MAPPING:FOLDER, or MAPPING:FOLDER:SPLIT."""

    mapping: AnnotationMapping
    file: Path
    """Of the mapping."""
    folder: Path
    split: str
    """"" where the mapping has none."""


def mapping_files() -> dict[str, Path]:
    """Return the files of mappings by name: those of `./recipes/data`, then the shipped ones."""
    return data_files(MAPPING_LINE, takes_unreadable=True)  # their user is told why


def find_mapped_source(location: str) -> MappedSource | None:
    """Return what MAPPING:FOLDER or MAPPING:FOLDER:SPLIT names; None for any other location.

    Raises a UserError for an unknown mapping, one with mistakes, an unknown split, no folder.
    """
    name, _, rest = location.partition(":")
    if rest.startswith("//") or Path(location).exists():
        return None
    if not rest:
        if name.endswith(YAML_SUFFIXES) or ("." not in name and name in mapping_files()):
            raise UserError(f"names a mapping and no folder; write {name}:FOLDER")
        return None
    file = _find_mapping(name, rest)
    if file is None:
        return None
    mapping = read_mapping(file)
    folder, split = _separate_split(name, mapping, Path(rest).expanduser())
    if not folder.is_dir():
        kind = "a file; expected the folder that holds it" if folder.exists() else "no folder"
        raise UserError(f"{folder} is {kind}")
    return MappedSource(mapping, file, folder, split)


def _find_mapping(name: str, rest: str) -> Path | None:
    """Return the file of a mapping; None for a name that is none, as that of a folder or a disk."""
    if name.endswith(YAML_SUFFIXES):
        return Path(name).expanduser()
    if len(name) < 2 or "/" in name or "\\" in name or _is_split(name, rest):
        return None
    known = mapping_files()
    if name in known or Path(name).exists():
        return known.get(name)
    raise UserError(
        f"no mapping of annotation files '{name}'; known: {', '.join(known)}, or a file "
        f"NAME.yaml.{suggest_name(name, known)}"
    )


def _is_split(name: str, rest: str) -> bool:
    """Tell whether NAME:REST is a folder of Parquet files here, and a split of them."""
    folder, is_named = Path(name), Path(rest).expanduser().is_dir()
    return folder.is_dir() and not is_named and any(iterate_parquet_files(folder))


def _separate_split(name: str, mapping: AnnotationMapping, path: Path) -> tuple[Path, str]:
    """Return the folder of FOLDER or FOLDER:SPLIT, and the split."""
    splits = mapping.splits or {}
    before, colon, split = str(path).rpartition(":")
    if not colon or path.exists():
        return path, next(iter(splits), "")
    if split not in splits:
        known = f"its splits are {', '.join(splits)}" if splits else "it has no splits"
        raise UserError(f"{name} has no split '{split}'; {known}.{suggest_name(split, splits)}")
    return Path(before), split


def locate_file(folder: Path, name: str, about: str = "") -> Path:
    """Return a file of a data set: at its place in the folder, or in a folder directly inside.

    A UserError where there is none says `about` it, too.
    """
    file_name = Path(name).name
    for path in (folder / name, folder / file_name):
        if path.is_file():
            return path
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    found = [path / file_name for path in inside if (path / file_name).is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        named = " and ".join(map(str, found))
        raise UserError(f"{file_name} is there more than once: {named}; name the folder of one")
    kind = f"*{Path(name).suffix}*"  # packed ones, too
    close = [path.name for one in (folder, *inside) for path in one.glob(kind)]
    raise UserError(
        f"there is no file {name} in {folder}, nor in a folder directly inside of it{about}."
        f"{suggest_name(file_name, close)}"
    )
