"""The files of a connector's source: which ones belong to it, their hash, and how they are run.

A folder with a `source.json` holds the kept source of a run or checkpoint. Its files are compiled
from their text: bytecode that lies beside them is never read, since the hash does not cover it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import cast

from vlbench.errors import UserError
from vlbench.text_files import read_text

RECORD_FILE = "source.json"
"""Says which connector the folder holds, and the hash of its files."""


class TextLoader(SourceFileLoader):
    """Runs a file from its text, never from bytecode."""

    def get_code(self, fullname: str) -> CodeType:
        """Return the compiled text of the file."""
        path = self.get_filename(fullname)
        return cast(CodeType, self.source_to_code(self.get_data(path), path))


def is_kept_file(file: Path) -> bool:
    """Tell whether a file belongs to the kept source of a run or checkpoint."""
    return (file.parent / RECORD_FILE).is_file()


def own_source_files(file: Path) -> list[Path]:
    """Return a connector's file and those of its folder that it imports, imported ones first."""
    found: dict[Path, None] = {}
    _collect_imports(file, found, set())
    return list(found)


def _collect_imports(file: Path, found: dict[Path, None], visited: set[Path]) -> None:
    visited.add(file)
    for name in _relative_imports(file):
        imported = file.parent / f"{name}.py"
        if imported.is_file() and imported not in visited:
            _collect_imports(imported, found, visited)
    found[file] = None


def _relative_imports(file: Path) -> list[str]:
    """Return the modules of its own folder that a file imports, as in `from .blocks import x`."""
    try:
        tree = ast.parse(read_text(file), str(file))
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            imported = [alias.name for alias in node.names]
            names += [node.module.partition(".")[0]] if node.module else imported
    return names


def source_hash(files: Sequence[Path]) -> str:
    """Return the SHA-256 of the names and bytes of source files, whatever their order."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda path: path.name):
        text = read_text(file).encode()
        digest.update(f"{file.name}\0{len(text)}\0".encode())
        digest.update(text)
    return digest.hexdigest()


def load_kept_module(file: Path, parent: str, shipped_folder: Path) -> ModuleType:
    """Run the kept source of a connector and return its module.

    The modules are those of a package of their own, named after the hash, so that two checkpoints
    with different files of one name do not replace each other.

    Args:
        file: The connector's file in a kept folder.
        parent: The module that the package is a submodule of.
        shipped_folder: Where files that the connector imports, and that are shipped, are found.
    """
    files = own_source_files(file)
    package_name = f"{parent}.kept_{source_hash(files)[:16]}"
    module_name = f"{package_name}.{file.stem}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    package = importlib.util.module_from_spec(ModuleSpec(package_name, None, is_package=True))
    package.__path__ = [str(shipped_folder)]
    sys.modules[package_name] = package
    try:
        for path in files:
            name = f"{package_name}.{path.stem}"
            spec = importlib.util.spec_from_loader(name, TextLoader(name, str(path)))
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
            setattr(package, path.stem, module)
    except Exception:
        for name in [name for name in sys.modules if f"{name}.".startswith(f"{package_name}.")]:
            del sys.modules[name]
        raise
    return sys.modules[module_name]
