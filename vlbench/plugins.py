"""Connectors by exact name: a drop-in file, a shipped file, or an entry point of another package.

`./connectors/NAME.py` comes first, then the shipped connectors, then the entry points of the group
`vlbench.connectors`. Only the one asked for is loaded, and two of the same name are refused.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import sys
import threading
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Any, NamedTuple

from vlbench.mistakes import Mistake, Trouble, nearest
from vlbench.signature import Option, signature_in, signature_of
from vlbench.values import convert

if TYPE_CHECKING:
    from vlbench.connector import Connector

GROUP = "vlbench.connectors"
_LOADING = threading.RLock()  # another thread would see a module that is not executed to its end


class Found(NamedTuple):
    """A connector that was found but not loaded: a file or an entry point."""

    where: str
    file: Path | None
    entry: importlib.metadata.EntryPoint | None


def shipped(kind: str) -> Path:
    """Return the shipped folder `connectors` or `recipes`, in an installed package or beside it."""
    inside = Path(__file__).resolve().parent / kind
    return inside if inside.is_dir() else inside.parent.parent / kind


# Drop-in files are submodules of this one, so that another process can unpickle their classes.
__path__: list[str] = [str(Path("connectors").absolute()), str(shipped("connectors"))]


def found() -> dict[str, list[Found]]:
    """Return all that was found under each name, by name; nothing is imported."""
    names: dict[str, list[Found]] = {}
    for folder in dict.fromkeys([Path("connectors").resolve(), shipped("connectors").resolve()]):
        for file in sorted(folder.glob("[!_.]*.py")):
            # an installed package used inside a checkout meets its own files again
            if not any(_same_text(one, file) for one in names.get(file.stem, [])):
                names.setdefault(file.stem, []).append(Found(str(file), file, None))
    for entry in importlib.metadata.entry_points(group=GROUP):
        package = f" of {entry.dist.name}" if entry.dist else ""
        found_entry = Found(f"entry point {entry.value}{package}", None, entry)
        names.setdefault(entry.name, []).append(found_entry)
    return dict(sorted(names.items()))


def sources() -> dict[str, str]:
    """Return where each connector comes from, by name; nothing is imported."""
    return {name: " and ".join(one.where for one in all_) for name, all_ in found().items()}


def find(name: str) -> Found:
    """Return the one connector called `name`; a Mistake when there is none or more than one."""
    known = found()
    if name not in known:
        names = ", ".join(known) or "none"
        raise Mistake(f"no connector '{name}'; known: {names}.{nearest(name, known)}")
    if len(known[name]) > 1:
        both = " and ".join(one.where for one in known[name])
        raise Mistake(f"connector '{name}' is defined twice: {both}; rename one of them")
    return known[name][0]


def connector(name: str) -> type[Connector]:
    """Load the connector called `name` and return its class; a Mistake when that fails."""
    one = find(name)
    if one.file is not None:
        with _LOADING:
            return _from_file(name, one.file)
    assert one.entry is not None
    try:
        cls = one.entry.load()
    except Exception as error:
        raise Mistake(f"connector '{name}' ({one.where}) fails to load: {_line(error)}") from error
    if not _is_connector(cls):
        raise Mistake(f"connector '{name}' ({one.where}) is not a subclass of Connector")
    return cls  # type: ignore[no-any-return]


def module(name: str) -> Any:
    """Return the module of the connector called `name`: other connectors may build on its parts."""
    return sys.modules[connector(name).__module__]


def options(name: str | type) -> dict[str, Option]:
    """Return the options (kind, default) of a connector by its name or class.

    The signature is read from the file's text where that tells all, so that torch is not imported.
    """
    if isinstance(name, type):
        return signature_of(name)
    file = find(name).file
    known = signature_in(file) if file is not None else None
    return signature_of(connector(name)) if known is None else known


def settle(name: str, given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return all options of connector `name`, those `given` converted, and the mistakes in them."""
    try:
        known = options(name)
    except Mistake as mistake:
        return given, [f"connector.name: {mistake}"]
    mistakes = [_unknown(name, key, known) for key in given if key not in known]
    values: dict[str, Any] = {}
    for key, option in known.items():
        try:
            values[key] = convert(given[key], option.kind) if key in given else option.default
        except ValueError as error:
            mistakes.append(f"connector.{key} {error}")
        if values.get(key) is inspect.Parameter.empty:
            mistakes.append(f"connector.{key} is missing; connector '{name}' needs it")
    return values, mistakes


def check(name: str, given: dict[str, Any]) -> list[str]:
    """Return what is wrong with the options `given` to connector `name`, a line each."""
    return settle(name, given)[1]


def blame(error: Exception) -> None:
    """Raise a Mistake that names the place, if an error comes from inside of a connector's file."""
    if isinstance(error, Mistake | Trouble):
        return
    places = [
        f"{frame.f_code.co_filename}:{line}"
        for frame, line in walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "").startswith(f"{__name__}.")
    ]
    if places:
        raise Mistake(f"{places[-1]}: {_line(error)}") from error


def _unknown(name: str, key: str, known: dict[str, Option]) -> str:
    takes = ", ".join(known) or "none"
    return f"connector '{name}' has no option '{key}'; it takes: {takes}.{nearest(key, known)}"


def _same_text(one: Found, file: Path) -> bool:
    return one.file is not None and one.file.read_bytes() == file.read_bytes()


def _from_file(name: str, file: Path) -> type[Connector]:
    module_name = f"{__name__}.{name}"
    module = sys.modules.get(module_name)
    if module is None or module.__file__ != str(file):
        spec = importlib.util.spec_from_file_location(module_name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # before it runs: dataclasses and pickle look it up there
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise Mistake(f"{file}{_at(error, file)}: {_line(error)}") from error
    own = [value for value in vars(module).values() if _is_connector(value)]
    own = [cls for cls in own if cls.__module__ == module_name and not cls.__name__.startswith("_")]
    own = list(dict.fromkeys(own))
    if len(own) != 1:
        names = ", ".join(cls.__name__ for cls in own) or "none"
        raise Mistake(f"{file} must define exactly one subclass of Connector, found {names}")
    return own[0]  # type: ignore[no-any-return]


def _is_connector(value: object) -> bool:
    from vlbench.connector import Connector

    return isinstance(value, type) and issubclass(value, Connector) and value is not Connector


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _at(error: Exception, file: Path) -> str:
    """Return ":LINE", the last line of `file` that had a part in `error`, or ""."""
    if isinstance(error, SyntaxError):
        return ""  # its text names the line already
    frames = walk_tb(error.__traceback__)
    lines = [line for frame, line in frames if frame.f_code.co_filename == str(file)]
    return f":{lines[-1]}" if lines else ""
