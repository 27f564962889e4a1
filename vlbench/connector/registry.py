"""Connectors by exact name: a file in `./connectors`, a shipped file, or another package's.

Other packages declare entry points of the group `vlbench.connectors`. Only the connector that is
asked for is imported; a name that is defined twice is refused.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from traceback import walk_tb
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from vlbench.connector.folder_modules import (
    calling_kept_folder,
    import_connector_file,
    is_connector_module,
    shipped_folder,
)
from vlbench.connector.option_schema import (
    ConnectorOption,
    check_option_size,
    options_in_file,
    options_of_class,
)
from vlbench.errors import EnvironmentFailure, UserError, one_line, suggest_name
from vlbench.strict_values import convert_value
from vlbench.system_errors import is_memory_error
from vlbench.text_files import read_text

if TYPE_CHECKING:
    from vlbench.connector.base import Connector

ENTRY_POINT_GROUP = "vlbench.connectors"


class ConnectorSource(NamedTuple):
    """Where a connector is defined, a file or an entry point; it is not imported yet."""

    location: str
    file: Path | None
    entry_point: importlib.metadata.EntryPoint | None


# Shipped files are submodules of this one, so that another process can unpickle their classes.
__path__: list[str] = [str(shipped_folder("connectors"))]


def find_connectors() -> dict[str, list[ConnectorSource]]:
    """Return the sources of every connector by name; nothing is imported.

    For the code of a kept source its own files come first: it is used with what it was trained
    with.
    """
    names: dict[str, list[ConnectorSource]] = {}
    shipped = shipped_folder("connectors").resolve()
    for folder in dict.fromkeys([shipped, Path("connectors").resolve()]):
        for file in _connector_files(folder):
            # an installed package that runs inside a checkout finds its own files twice
            if not any(_has_same_text(source, file) for source in names.get(file.stem, [])):
                names.setdefault(file.stem, []).append(ConnectorSource(str(file), file, None))
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        package = f" of {entry.dist.name}" if entry.dist else ""
        source = ConnectorSource(f"entry point {entry.value}{package}", None, entry)
        names.setdefault(entry.name, []).append(source)
    kept_folder = calling_kept_folder()
    for file in _connector_files(kept_folder) if kept_folder else ():
        names[file.stem] = [ConnectorSource(str(file), file, None)]
    return dict(sorted(names.items()))


def _connector_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("[!_.]*.py"))


def is_shipped(source: ConnectorSource) -> bool:
    """Tell whether a connector comes with vlbench."""
    shipped = shipped_folder("connectors")
    return source.file is not None and source.file.resolve().parent == shipped.resolve()


def connector_locations() -> dict[str, str]:
    """Return where each connector comes from, by name; nothing is imported."""
    return {
        name: " and ".join(source.location for source in sources)
        for name, sources in find_connectors().items()
    }


def connector_label(name: str) -> str:
    """Return the short name of a connector that may be given as a file: `a/mine.py` is mine."""
    return Path(name).stem if name.endswith(".py") else name


def find_connector(name: str) -> ConnectorSource:
    """Return the source of a connector, its name or a file `.py`.

    Raises:
        UserError: when there is none, or more than one of that name.
    """
    if name.endswith(".py"):
        file = Path(name).expanduser()
        if not file.is_file():
            raise UserError(f"connector '{name}' is no file")
        return ConnectorSource(str(file), file, None)
    known = find_connectors()
    if name not in known:
        names = ", ".join(known) or "none"
        raise UserError(f"no connector '{name}'; known: {names}.{suggest_name(name, known)}")
    if len(known[name]) > 1:
        both = " and ".join(source.location for source in known[name])
        raise UserError(f"connector '{name}' is defined twice: {both}; rename one of them")
    return known[name][0]


def load_connector(name: str) -> type[Connector]:
    """Import a connector and return its class; a UserError when that fails."""
    source = find_connector(name)
    if source.file is not None:
        return _load_from_file(source, source.file)
    assert source.entry_point is not None
    try:
        cls = source.entry_point.load()
    except (Exception, SystemExit) as error:
        raise UserError(
            f"connector '{name}' ({source.location}) fails to load: {_typed_line(error)}"
        ) from error
    if not _is_connector(cls):
        raise UserError(f"connector '{name}' ({source.location}) is not a subclass of Connector")
    _check_inject_arguments(cls, source.location)
    return cls  # type: ignore[no-any-return]


def connector_module(name: str) -> Any:
    """Return the module of a connector, whose parts other connectors may use."""
    return sys.modules[load_connector(name).__module__]


def connector_options(name_or_class: str | type) -> dict[str, ConnectorOption]:
    """Return the options (type, default) of a connector by its name or class.

    They are read from the text of its file where that suffices, so that torch is not imported.
    """
    if isinstance(name_or_class, type):
        return options_of_class(name_or_class)
    file = find_connector(name_or_class).file
    known = options_in_file(file) if file is not None else None
    return options_of_class(load_connector(name_or_class)) if known is None else known


def resolve_options(name: str, given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return all options of a connector, defaults filled in, and what is wrong with those given."""
    try:
        known = connector_options(name)
    except UserError as error:
        return given, [f"connector.name: {error}"]
    errors = [_unknown_option(name, key, known) for key in given if key not in known]
    values: dict[str, Any] = {}
    for key, option in known.items():
        try:
            values[key] = convert_value(given[key], option.kind) if key in given else option.default
            check_option_size(values[key])
        except ValueError as error:
            errors.append(f"connector.{key} {error}")
        if values.get(key) is inspect.Parameter.empty:
            errors.append(f"connector.{key} is missing; connector '{name}' needs it")
    return values, errors


def blame_connector_file(error: Exception) -> None:
    """Raise a UserError with file and line if an error comes from a connector's own code."""
    if isinstance(error, UserError | EnvironmentFailure) or is_memory_error(error):
        return
    locations = [
        f"{frame.f_code.co_filename}:{line}"
        for frame, line in walk_tb(error.__traceback__)
        if is_connector_module(frame.f_globals.get("__name__") or "")
    ]
    if locations:
        raise UserError(f"{locations[-1]}: {_typed_line(error)}") from error


@contextlib.contextmanager
def blame_connector_errors(left_alone: type[Exception] = UserError) -> Iterator[None]:
    """Let errors of a connector's own code leave `with` as a UserError with file and line.

    Errors of the type `left_alone` stay as they are: a connector that is built says in a ValueError
    what does not fit.
    """
    try:
        yield
    except left_alone:
        raise
    except Exception as error:
        blame_connector_file(error)
        raise


def _unknown_option(name: str, option_name: str, known: dict[str, ConnectorOption]) -> str:
    takes = ", ".join(known) or "none"
    return (
        f"connector '{name}' has no option '{option_name}'; it takes: "
        f"{takes}.{suggest_name(option_name, known)}"
    )


def _has_same_text(source: ConnectorSource, file: Path) -> bool:
    return source.file is not None and read_text(source.file) == read_text(file)


def _load_from_file(source: ConnectorSource, file: Path) -> type[Connector]:
    try:
        module: ModuleType = (
            importlib.import_module(f"{__name__}.{file.stem}")
            if is_shipped(source)
            else import_connector_file(file)
        )
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a script that ends itself, as by argparse
        raise UserError(f"{file}{_line_suffix(error, file)}: {_typed_line(error)}") from error
    module_name = module.__name__
    own = [value for value in vars(module).values() if _is_connector(value)]
    own = [cls for cls in own if cls.__module__ == module_name and not cls.__name__.startswith("_")]
    own = list(dict.fromkeys(own))
    if len(own) != 1:
        names = ", ".join(cls.__name__ for cls in own) or "none"
        raise UserError(f"{file} must define exactly one subclass of Connector, found {names}")
    _check_inject_arguments(own[0], str(file))
    return own[0]  # type: ignore[no-any-return]


def _is_connector(value: object) -> bool:
    from vlbench.connector.base import Connector

    return isinstance(value, type) and issubclass(value, Connector) and value is not Connector


def _check_inject_arguments(cls: type[Connector], location: str) -> None:
    """Raise a UserError for a connector that was written for the contract before `where`."""
    if "image_index" in inspect.signature(cls.inject).parameters:
        raise UserError(
            f"{location}: inject of {cls.__name__} takes image_index; its arguments are layer, "
            "hidden, visual, where: write where.image_index for image_index"
        )


def _typed_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error, max_lines=1)}"


def _line_suffix(error: BaseException, file: Path) -> str:
    """Return ":LINE", the last line of `file` in the traceback of `error`, or ""."""
    if isinstance(error, SyntaxError):
        return ""  # its message names the line
    frames = walk_tb(error.__traceback__)
    lines = [line for frame, line in frames if frame.f_code.co_filename == str(file.absolute())]
    return f":{lines[-1]}" if lines else ""
