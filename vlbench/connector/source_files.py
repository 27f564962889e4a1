"""The files of a connector's source: which ones belong to it, and their hash.

A connector's source is its file, what that file imports relatively (of its own folder and of
folders below it), the connectors whose parts it uses by name, and the data files that it names.
Everything is found in the text: no code runs.

A folder with a `source.json` holds the kept source of a run or checkpoint: all of its files count.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.machinery
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from vlbench.errors import UserError
from vlbench.regular_files import format_bytes, read_regular
from vlbench.text_files import read_text

RECORD_FILE = "source.json"
"""Says which connector the folder holds, and the hash of its files."""
LOOKUPS = ("connector_module", "load_connector", "connector_options")
"""Functions of the registry by which a connector uses another one."""
OWN_PLACE = ("__file__", "__package__", "__spec__")
"""Names by which a file finds what lies beside it."""
MAX_KEPT_BYTES, MAX_KEPT_FILES = 64_000_000, 1_000  # a copy is in every checkpoint
INSTALLED_FOLDERS = {"site-packages", "dist-packages"}

ConnectorFinder = Callable[[str], Path | None]
"""Returns the file of a connector by its name; None for one that is shipped, or of a package."""


def is_kept_file(file: Path) -> bool:
    """Tell whether a file belongs to the kept source of a run or checkpoint."""
    return (file.parent / RECORD_FILE).is_file()


def own_source_files(file: Path, find_connector: ConnectorFinder) -> dict[str, Path]:
    """Return the files of a connector's source, by their paths relative to its folder.

    Raises a UserError for a file that cannot be read, for more than is kept, and where two folders
    have different files of one name.
    """
    found: dict[str, Path] = {}
    _collect_module(file, PurePosixPath(file.name), found, find_connector)
    _check_amount(found, file)
    return dict(sorted(found.items()))


def kept_source_files(folder: Path) -> dict[str, Path]:
    """Return the files of a kept source, by their paths relative to its folder."""
    files = dict(_files_below(folder, PurePosixPath()))
    files.pop(RECORD_FILE, None)
    _check_amount(files, folder)
    return files


def source_hash(files: Mapping[str, Path]) -> str:
    """Return the SHA-256 of the names and contents of source files; line ends do not count."""
    digest = hashlib.sha256()
    for name, file in sorted(files.items()):
        is_source = file.suffix == ".py"
        content = read_text(file).encode() if is_source else read_regular(file, MAX_KEPT_BYTES)
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _check_amount(files: Mapping[str, Path], named: Path) -> None:
    """Refuse more files than a source has; `named` is their file or folder."""
    sizes = [path.stat().st_size for path in files.values()]
    if sum(sizes) > MAX_KEPT_BYTES or len(sizes) > MAX_KEPT_FILES:
        raise UserError(
            f"{named}: the source of a connector, with the data files that it names, has at most "
            f"{MAX_KEPT_FILES:,} files of {format_bytes(MAX_KEPT_BYTES)}; this one has "
            f"{len(sizes):,} of {format_bytes(sum(sizes))}"
        )


def loose_imports(files: Mapping[str, Path]) -> dict[str, str]:
    """Return the modules that source files import and that neither are kept nor installed.

    They lie below the current folder; each name is given with the place where Python finds it.
    """
    names = {
        name
        for file in files.values()
        if file.suffix == ".py"
        for name in _absolute_imports(_parse(file))
    }
    found: dict[str, str] = {}
    for name in sorted(names - sys.stdlib_module_names - {"vlbench"}):
        spec = importlib.machinery.PathFinder.find_spec(name)
        places = [spec.origin, *(spec.submodule_search_locations or ())] if spec else []
        place = next((Path(text).absolute() for text in places if text), None)
        if place and place.is_relative_to(Path.cwd()) and not INSTALLED_FOLDERS & {*place.parts}:
            found[name] = str(place)
    return found


def _collect_module(
    file: Path, name: PurePosixPath, found: dict[str, Path], find_connector: ConnectorFinder
) -> None:
    """Add a file of Python and what it uses to `found`; `name` is its path in the source."""
    if not _add(found, str(name), file):
        return
    tree = _parse(file)
    root = file.parents[len(name.parts) - 1]
    for imported in _relative_imports(tree, name):
        for candidate in (imported.with_suffix(".py"), imported / "__init__.py"):
            if (root / candidate).is_file():
                _collect_module(root / candidate, candidate, found, find_connector)
    for connector_name in _connector_names(tree):
        beside = root / f"{connector_name}.py"
        connector = beside if beside.is_file() else find_connector(connector_name)
        if connector is not None:
            _collect_module(connector, PurePosixPath(connector.name), found, find_connector)
    for relative, path in _named_files(tree, file.parent, name.parent):
        _add(found, relative, path)


def _add(found: dict[str, Path], name: str, file: Path) -> bool:
    """Add a file and tell whether it is new; a UserError for another file of its name."""
    before = found.setdefault(name, file)
    if before.resolve() != file.resolve():
        raise UserError(f"{before} and {file} cannot be kept together: rename one of them")
    return before is file


def _parse(file: Path) -> ast.Module:
    try:
        return ast.parse(read_text(file), str(file))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{file} cannot be read: {type(error).__name__}: {error}") from error


def _relative_imports(tree: ast.Module, name: PurePosixPath) -> Iterator[PurePosixPath]:
    """Yield the modules that `from .blocks import x` may mean, and their packages.

    They are paths in the source, without a suffix. What lies above of it is not looked for.
    """
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not 1 <= node.level <= len(name.parts):
            continue
        package = PurePosixPath(*name.parts[: len(name.parts) - node.level])
        for part in node.module.split(".") if node.module else ():
            package /= part
            yield package
        for alias in node.names:
            yield package / alias.name


def _absolute_imports(tree: ast.Module) -> Iterator[str]:
    """Yield the packages that a file imports by their full names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def _connector_names(tree: ast.Module) -> Iterator[str]:
    """Yield the names with which a file asks the registry for other connectors."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            function, first = node.func, node.args[0]
            asked = function.attr if isinstance(function, ast.Attribute) else ast.unparse(function)
            if asked in LOOKUPS and isinstance(first, ast.Constant):
                yield str(first.value)


def _named_files(tree: ast.Module, folder: Path, name: PurePosixPath) -> Iterator[tuple[str, Path]]:
    """Yield the files below `folder` that a text names, all of a folder that it names.

    Nothing is looked for where the text does not ask for its own place.
    """
    nodes = list(ast.walk(tree))
    if not any(isinstance(node, ast.Name) and node.id in OWN_PLACE for node in nodes):
        return
    texts = {node.value for node in nodes if isinstance(node, ast.Constant)}
    for text in sorted(text for text in texts if isinstance(text, str)):
        relative = PurePosixPath(text)
        is_below = relative.parts and not relative.is_absolute() and ".." not in relative.parts
        if not is_below or len(text) > 255 or "\0" in text:
            continue
        if (folder / relative).is_file():
            yield str(name / relative), folder / relative
        elif (folder / relative).is_dir():
            yield from _files_below(folder / relative, name / relative)


def _files_below(folder: Path, name: PurePosixPath) -> Iterator[tuple[str, Path]]:
    """Yield the files in a folder and below it, not those of folders that are links.

    Hidden ones and bytecode do not count.
    """
    for place, folder_names, file_names in os.walk(folder):
        folder_names[:] = [n for n in folder_names if n[0] != "." and n != "__pycache__"]
        for file in (Path(place, file_name) for file_name in file_names if file_name[0] != "."):
            if file.is_file():
                yield str(name / file.relative_to(folder).as_posix()), file
