"""The Parquet files of a data set: of a split, in a folder or on the Hugging Face hub.

Layouts are those that the `datasets` library loads: `data/train-00000-of-00004.parquet`,
`SUBSET/train-00000-of-00001.parquet`, `default/train/0000.parquet`, and files without a split.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TypeVar

from vlbench.errors import UserError, one_line, suggest_name
from vlbench.hub_download import explain_hub_error
from vlbench.text_files import read_text
from vlbench.text_tables import list_some

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(/\w[^:]*)?(:[\w.-]+)?")
"""OWNER/NAME, OWNER/NAME/SUBSET as LLaVA-OneVision's `ai2d(gpt4v)`, and either with :SPLIT."""
FILE_NAME = re.compile(r".*\.(jsonl?|ndjson|csv|tsv|txt|parquet|arrow|tar|gz|zip|ya?ml)", re.I)
"""Names of files, which are no names on the hub."""
NUMBERED_NAME = re.compile(r"(.+?)-(\d+)-of-(\d+).*\.parquet")
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
"""Words in names of files and folders that tell a split, and its name."""
DEFAULT_SPLIT = "train"
MAX_NAMED_FILES = 5  # in an error
LOST_AND_FOUND = "lost+found"  # which file systems make, and nobody else may read

PathT = TypeVar("PathT", Path, PurePath)


def is_hub_name(location: str) -> bool:
    """Tell whether a location that is no path here may be a data set on the hub."""
    path = Path(location)
    is_local = path.exists() or Path(path.parts[0]).exists() if path.parts else True
    return not is_local and bool(HUB_NAME.fullmatch(location)) and not FILE_NAME.fullmatch(location)


def find_parquet_files(location: str) -> list[Path]:
    """Return the files of a split of `location`: FOLDER, OWNER/NAME, either with :SPLIT behind it.

    Those of the hub are downloaded. Returns [] for a location without Parquet files. Raises a
    UserError for an unknown split, missing files, and what the hub cannot give.
    """
    folder, split = _separate_split(location)
    if not folder.is_dir():
        return _download_split(location) if is_hub_name(location) else []
    files = sorted(iterate_parquet_files(folder))
    if not files:
        return []
    chosen = choose_split(location, [file.relative_to(folder) for file in files], split)
    paths = [folder / file for file in chosen]
    if paths[0].with_suffix(".tar").is_file():
        raise UserError(
            "its Parquet files stand beside tar files of the same names, as img2dataset writes "
            f"them: give {paths[0].parent}/*.tar"
        )
    refuse_missing_files(paths)
    return paths


def iterate_parquet_files(folder: Path) -> Iterator[Path]:
    """Yield the Parquet files below a folder, in no order; links are followed.

    A folder that several paths lead to is read once; hidden files and folders are passed over.
    Raises a UserError for a folder that may not be read, and for a link to nothing.
    """
    seen = set()
    for place, folders, files in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        real_place = os.path.realpath(place)
        if real_place in seen:
            folders.clear()
            continue
        seen.add(real_place)
        folders[:] = [n for n in sorted(folders) if not _is_hidden(n) and n != LOST_AND_FOUND]
        for name in files:
            if name.endswith(".parquet") and not _is_hidden(name):
                if not Path(place, name).exists():
                    raise UserError(f"{Path(place, name)} is a link to nothing")
                yield Path(place, name)


def _refuse_folder(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _separate_split(location: str) -> tuple[Path, str]:
    """Return the path before :SPLIT, and the split, "" for none."""
    path, _, split = location.rpartition(":")
    is_whole = not path or Path(location).exists() or "/" in split
    return (Path(location), "") if is_whole else (Path(path), split)


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def choose_split(location: str, files: Sequence[PathT], split: str = "") -> list[PathT]:
    """Return the files of a split ("": the one to train on); all of them where none is told.

    A UserError where there is no such split, or `split` is "" and files without one would be left
    out beside it.
    """
    splits: dict[str, list[PathT]] = defaultdict(list)
    for file in files:
        splits[_split_of(file)].append(file)
    if not split and splits.keys() == {""}:
        return list(files)
    wanted = split or DEFAULT_SPLIT
    alike = [
        name for name in splits if SPLIT_WORDS.get(name, name) == SPLIT_WORDS.get(wanted, wanted)
    ]
    if not alike and not split:  # train_sft
        alike = [name for name in splits if wanted in re.split(r"\W|_", name)]
    if len(alike) != 1:
        known = ", ".join(filter(None, splits)) or "none"
        base = location.removesuffix(f":{split}") if split else location
        raise UserError(
            f"has no split {wanted!r}; it has {known}, of which {base}:SPLIT is one."
            f"{suggest_name(wanted, splits)}"
        )
    if not split and splits.get(""):
        raise _splitless_error(location, splits, alike[0])
    return splits[alike[0]]


def _splitless_error(location: str, splits: Mapping[str, list[PathT]], wanted: str) -> UserError:
    """Return the error for files that tell no split beside those of the split to train on."""
    files = [str(file) for file in splits[""]]
    return UserError(
        f"has {len(files)} Parquet files that tell no split ({list_some(files, MAX_NAMED_FILES)}), "
        f"and {len(splits[wanted])} of the split {wanted!r}; {location}:{wanted} reads the latter "
        "alone, and a folder of the others, or each by its name (data.mix has several), those"
    )


def _split_of(file: PurePath) -> str:
    """Return the split that a file belongs to, "" where its path tells none.

    A number tells the rest of a name to be a split (`train_sft-00000-of-00002`), unless that is
    another word and a folder tells one (`train/part-00000-of-00002`).
    """
    numbered = NUMBERED_NAME.fullmatch(file.name)
    if numbered and _split_words(numbered[1]):
        return numbered[1]
    for part in (file.stem, *reversed(file.parts[:-1])):
        if words := _split_words(part):
            return words[0]
    return numbered[1] if numbered else ""


def _split_words(name: str) -> list[str]:
    """Return the splits that the words of a name tell."""
    words = re.split(r"[\W_\d]+", name.lower())
    return [SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS]


def refuse_missing_files(files: Sequence[Path]) -> None:
    """Raise a UserError when one of several files of a split, NAME-00000-of-00004, is missing.

    Also where one is there twice, or NAME is there in several numbers of files: a split that was
    written again, all samples of which would be read twice.
    """
    present: dict[tuple[Path, str], dict[int, dict[int, Path]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for file in files:
        match = NUMBERED_NAME.fullmatch(file.name)
        if match:
            same_count = present[file.parent, match[1]][int(match[3])]
            other = same_count.setdefault(int(match[2]), file)
            if other is not file:
                raise UserError(
                    f"{file.parent}: {other.name} and {file.name} are the same part of a split, "
                    "written twice; remove one"
                )
    for (folder, name), by_count in present.items():
        if len(by_count) > 1:
            counts = " and ".join(f"{name}-*-of-{count:05d}" for count in sorted(by_count))
            raise UserError(
                f"{folder}: has {counts}, a split that was written twice; remove the files of one"
            )
        [(count, numbers)] = by_count.items()
        missing = sorted(set(range(count)) - numbers.keys())
        if missing:
            names = ", ".join(f"{number:05d}-of-{count:05d}" for number in missing[:5])
            raise UserError(f"{folder}: of {count} files {len(missing)} are missing: {names}")


def _download_split(location: str) -> list[Path]:
    """Download the files of a split of a data set on the hub; return their paths.

    Where the hub cannot be asked, it is what was downloaded before.
    """
    from huggingface_hub import HfApi, snapshot_download

    name, _, split = location.partition(":")
    owner, repository, *subset = name.split("/")
    repo_id, folder = f"{owner}/{repository}", "/".join(subset)
    try:
        listed = HfApi().list_repo_files(repo_id, repo_type="dataset")
    except Exception as error:  # of network, disk and permission
        snapshot = _cached_snapshot(repo_id)
        if snapshot is not None:
            return find_parquet_files(f"{snapshot / folder}{f':{split}' if split else ''}")
        raise UserError(
            "there is no such file or folder, and no such data set on the hub "
            f"({explain_hub_error(error, repo_id)})"
        ) from error
    files = sorted(file for file in listed if file.endswith(".parquet"))
    chosen = _choose_hub_files(location, files, folder, split)
    try:
        # nosec B615 below: the user names a data set, whose newest commit it is
        snapshot = Path(
            snapshot_download(repo_id, repo_type="dataset", allow_patterns=chosen)  # nosec B615
        )
    except Exception as error:  # of network, disk and permission
        raise UserError(f"the hub cannot give it ({explain_hub_error(error, repo_id)})") from error
    return [snapshot / file for file in chosen]


def _cached_snapshot(repo_id: str) -> Path | None:
    """Return the folder of a data set that was downloaded before, None for none."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE) / f"datasets--{repo_id.replace('/', '--')}"
    reference = cache / "refs/main"
    if not reference.is_file():
        return None
    snapshot = cache / "snapshots" / read_text(reference).strip()
    return snapshot if snapshot.is_dir() else None


def _choose_hub_files(location: str, files: list[str], folder: str, split: str) -> list[str]:
    """Return the files of a subset and a split."""
    subsets = sorted({str(PurePath(file).parent) for file in files})
    inside = [file for file in files if not folder or file.startswith(f"{folder}/")]
    if not inside:
        what = f"no Parquet files in {folder}" if folder else "no Parquet files"
        known = f"; it has {', '.join(subsets)}.{suggest_name(folder, subsets)}" if subsets else ""
        raise UserError(f"the data set on the hub has {what}{known}")
    chosen = [str(file) for file in choose_split(location, list(map(PurePath, inside)), split)]
    chosen_subsets = sorted({str(PurePath(file).parent) for file in chosen})
    if len(chosen_subsets) > 1 and not folder:
        named = ", ".join(chosen_subsets[:40])
        name = one_line(location.partition(":")[0])
        raise UserError(
            f"the data set on the hub has {len(chosen_subsets)} subsets; name one, as "
            f"{name}/{chosen_subsets[0]}: {named}"
        )
    return chosen
