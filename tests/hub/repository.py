"""One repository of a hub: files that are made when they are asked for, and their names in git."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

LFS = (".safetensors", ".bin", ".pt", ".pth", ".model", ".parquet", ".tar", ".msgpack", ".h5")
"""Suffixes of files that the hub keeps outside of git."""


@dataclass(frozen=True)
class RepositoryFile:
    """A file of a repository: its name there, and where its content lies."""

    name: str
    path: Path

    @cached_property
    def size(self) -> int:
        """Bytes of the content."""
        return self.path.stat().st_size

    @property
    def is_lfs(self) -> bool:
        """Whether git holds a pointer in its place."""
        return self.name.endswith(LFS)

    @cached_property
    def sha256(self) -> str:
        """What LFS calls the content."""
        with self.path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    @property
    def lfs_pointer(self) -> bytes:
        """What a clone without LFS has instead of the content."""
        lines = ("version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}")
        return "\n".join([*lines, f"size {self.size}", ""]).encode()

    @cached_property
    def git_oid(self) -> str:
        """What git calls the file: of the pointer where there is one."""
        content = self.lfs_pointer if self.is_lfs else self.path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        """What names the content, for caches."""
        return self.sha256 if self.is_lfs else self.git_oid

    def tree_entry(self) -> dict[str, Any]:
        """Return the file as the hub lists it."""
        entry = {"type": "file", "oid": self.git_oid, "size": self.size, "path": self.name}
        if self.is_lfs:
            lfs = {"oid": self.sha256, "size": self.size, "pointerSize": len(self.lfs_pointer)}
            entry["lfs"] = lfs
        return entry


class HubRepository:
    """A repository `OWNER/NAME` of `kind` models or datasets, whose files `write_files` writes.

    `gated`: only requests with a token that the hub knows get its files.
    """

    def __init__(
        self, name: str, folder: Path, write_files: Callable[[Path], None], kind: str = "models"
    ) -> None:
        self.name, self.kind, self.gated = name, kind, False
        self._folder, self._write_files, self._lock = folder, write_files, threading.Lock()

    @property
    def folder(self) -> Path:
        """The folder with the files; the first who asks waits until they are made."""
        with self._lock:
            if self._write_files is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._write_files(self._folder)
                self._write_files = None
        return self._folder

    @cached_property
    def files(self) -> dict[str, RepositoryFile]:
        """All files by name."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        names = {path.relative_to(self.folder).as_posix(): path for path in paths}
        return {name: RepositoryFile(name, path) for name, path in names.items()}

    @cached_property
    def commit(self) -> str:
        """The commit that `main` is: another one when a file is another one."""
        text = "\n".join(f"{file.git_oid} {name}" for name, file in self.files.items())
        return hashlib.sha1(text.encode()).hexdigest()

    def repository_info(self) -> dict[str, Any]:
        """Return what the hub tells of the repository."""
        return {
            "id": self.name,
            "sha": self.commit,
            "private": False,
            "gated": "auto" if self.gated else False,
            "disabled": False,
            "tags": [],
            "siblings": [{"rfilename": name} for name in self.files],
        }

    def tree_entries(self, folder: str = "", recursive: bool = True) -> Iterator[dict[str, Any]]:
        """Give the files and folders in a folder of the repository, as the hub lists them."""
        start, told = f"{folder}/" if folder else "", set()
        for name, file in self.files.items():
            if not name.startswith(start):
                continue
            parents = name.removeprefix(start).split("/")[:-1]
            for depth in range(1, len(parents) + 1):
                path = start + "/".join(parents[:depth])
                if path not in told and (recursive or depth == 1):
                    told.add(path)
                    oid = hashlib.sha1(path.encode()).hexdigest()
                    yield {"type": "directory", "oid": oid, "size": 0, "path": path}
            if recursive or not parents:
                yield file.tree_entry()

    def clone(self, folder: Path) -> Path:
        """Write what `git clone` without LFS gives: pointers where the weights should be."""
        for name, file in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(file.lfs_pointer if file.is_lfs else file.path.read_bytes())
        return folder
