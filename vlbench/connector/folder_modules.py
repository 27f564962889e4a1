"""Connectors outside of vlbench as modules: each folder of them is a package of its own.

The package's name says which folder it is, so that another process can find the module of a class
that was pickled; two folders with files of one name do not meet. Files are run from their text: of
bytecode beside them nobody knows whether it belongs to it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import cast

from vlbench.connector.source_files import is_kept_file, kept_source_files, source_hash

PARENT = __name__.rpartition(".")[0]
FOLDER_PREFIX, KEPT_PREFIX = f"{PARENT}.in_", f"{PARENT}.kept_"
_IMPORT_LOCK = threading.RLock()  # else another thread sees files of before and after an edit
HASH_DIGITS = 16  # of a kept source, in the name of its package


class TextLoader(SourceFileLoader):
    """Runs a file from its text, never from bytecode."""

    text = b""

    def get_code(self, fullname: str) -> CodeType:
        """Return the compiled text of the file."""
        self.text = self.get_data(self.path)
        return cast(CodeType, self.source_to_code(self.text, self.path))

    @property
    def is_current(self) -> bool:
        """True while the file has the text that was run."""
        try:
            return self.get_data(self.path) == self.text
        except OSError:
            return False


class FolderFinder(MetaPathFinder):
    """Finds the packages of folders, and the files in them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a module; None where others may find it."""
        del path, target
        folder = module_folder(fullname)
        if folder is None:
            return None
        inner_name = fullname.split(".")[PARENT.count(".") + 2 :]
        if inner_name:
            return _find_text(fullname, folder.joinpath(*inner_name))
        if fullname.startswith(KEPT_PREFIX) and fullname != package_of(folder, is_kept=True):
            raise ImportError(f"{folder} has changed")
        spec = ModuleSpec(fullname, None, is_package=True)
        spec.submodule_search_locations = [str(shipped_folder("connectors"))]
        return spec


def shipped_folder(folder_name: str) -> Path:
    """Return the shipped folder `connectors` or `recipes`: in a wheel, or beside the package."""
    inside = Path(__file__).resolve().parents[1] / folder_name
    return inside if inside.is_dir() else inside.parent.parent / folder_name


def _find_text(name: str, path: Path) -> ModuleSpec | None:
    """Return the spec of a file of Python, or of a folder; None where there is neither."""
    package_file, file = path / "__init__.py", path.with_name(f"{path.name}.py")
    for candidate, places in ((package_file, []), (file, None)):
        if candidate.is_file():
            loader = TextLoader(name, str(candidate))
            return importlib.util.spec_from_file_location(
                name, candidate, loader=loader, submodule_search_locations=places
            )
    return ModuleSpec(name, None, is_package=True) if path.is_dir() else None


def package_of(folder: Path, is_kept: bool) -> str:
    """Return the name of the package that a folder's connectors are modules of."""
    place = os.fsencode(folder).hex()
    if not is_kept:
        return f"{FOLDER_PREFIX}{place}"
    return f"{KEPT_PREFIX}{source_hash(kept_source_files(folder))[:HASH_DIGITS]}_{place}"


def module_folder(module_name: str) -> Path | None:
    """Return the folder of the package that a module is, or is in; None for other modules."""
    for prefix in (FOLDER_PREFIX, KEPT_PREFIX):
        if module_name.startswith(prefix):
            package = module_name.removeprefix(prefix).partition(".")[0]
            try:
                return Path(os.fsdecode(bytes.fromhex(package.rpartition("_")[2])))
            except ValueError:
                return None
    return None


def import_connector_file(file: Path) -> ModuleType:
    """Import a connector's file as a module of its folder's package.

    What was imported before is used again, unless a file of the folder was edited since.
    """
    file = file.absolute()
    package = package_of(file.parent, is_kept_file(file))
    with _IMPORT_LOCK:
        loaded = {
            name: module.__spec__.loader
            for name, module in list(sys.modules.items())
            if f"{name}.".startswith(f"{package}.") and module.__spec__ is not None
        }
        loaders = [one for one in loaded.values() if isinstance(one, TextLoader)]
        if not all(loader.is_current for loader in loaders):
            for name in loaded:
                del sys.modules[name]
        importlib.invalidate_caches()
        return importlib.import_module(f"{package}.{file.stem}")


def is_connector_module(name: str) -> bool:
    """Tell whether a module is a connector's, shipped or not, or one that it has imported."""
    return name.startswith((FOLDER_PREFIX, KEPT_PREFIX, f"{PARENT}.registry."))


def calling_kept_folder() -> Path | None:
    """Return the folder of the kept source whose code has called; None where others have.

    The innermost connector on the stack counts.
    """
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__") or ""
        if is_connector_module(name):
            return module_folder(name) if name.startswith(KEPT_PREFIX) else None
        frame = frame.f_back  # type: ignore[assignment]
    return None
