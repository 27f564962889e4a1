"""Where shards are named: tar files, or a folder with the list that `pack` writes beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlbench.data.location_errors import folder_remedy
from vlbench.data.remote_shards import (
    file_exists,
    read_json_file,
    shown_name,
    split_query,
)
from vlbench.data.shard_index import MAX_SHARD_SAMPLES
from vlbench.errors import UserError

SHARD_LIST_FILE = "shards.json"
TAR_ENDINGS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


def is_tar(name: str) -> bool:
    """Tell whether a path or URL is that of a tar file, compressed or not."""
    return split_query(name)[0].lower().endswith(TAR_ENDINGS)


def read_shard_list(location: str) -> tuple[list[str], list[int]] | None:
    """Return the tar files of a folder and their numbers of samples; None for a tar pattern."""
    if is_tar(location):
        return None
    base, query = split_query(location)
    folder = base.rstrip("/") + "/"
    file = folder + SHARD_LIST_FILE + query
    if not file_exists(file):
        remedy = "give a folder that `pack` wrote, or tar files as dir/{000000..000123}.tar"
        if Path(location).is_dir() and any(Path(location).iterdir()):
            remedy = folder_remedy(Path(location))
        raise UserError(f"data {shown_name(location)}: holds no {SHARD_LIST_FILE}; {remedy}")
    content = read_json_file(file)
    shards = content.get("shards") if isinstance(content, dict) else None
    if not isinstance(shards, list) or not all(map(_is_shard, shards)) or not shards:
        raise UserError(f"{shown_name(file)}: is not a list of shards with file and samples")
    files = [folder + shard["file"] + query for shard in shards]
    return files, [shard["samples"] for shard in shards]


def _is_shard(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("file"), str)
        and ".." not in Path(value["file"]).parts
        and type(value.get("samples")) is int
        and 0 < value["samples"] <= MAX_SHARD_SAMPLES
    )
