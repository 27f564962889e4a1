"""One's own connector stays with what it was trained to do: its source is kept beside the weights.

A run and each of its checkpoints have a folder `connector` with the file, what it uses of those
beside it, and `source.json`. They are used wherever `./connectors` does not have the same text. A
shipped connector that uses one's own is kept as well.
Code runs from there only if this user made a run with it, or with `trust_connector=true`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlbench.connector import registry
from vlbench.connector.source_files import (
    RECORD_FILE,
    kept_source_files,
    loose_imports,
    own_source_files,
    source_hash,
)
from vlbench.errors import UserError
from vlbench.text_files import read_json, read_text

KEPT_FOLDER = "connector"
"""Name of the folder in a run and in a checkpoint."""


def keep_source(connector: Mapping[str, Any], folder: Path) -> None:
    """Keep the source of a recipe's connector in the new folder of a run; shipped ones need none.

    Its hash is noted in the user's state folder, so that this user's own runs need no trust. Of a
    connector of another package, its name and version are recorded.
    """
    source = registry.find_connector(connector["name"])
    files = _source_files(connector)
    if not files and source.entry_point is None:
        return
    record: dict[str, Any] = {"name": registry.connector_label(connector["name"])}
    if source.entry_point is not None:
        distribution = source.entry_point.dist
        record["entry_point"] = source.entry_point.value
        record["package"] = distribution.name if distribution else ""
        record["version"] = distribution.version if distribution else ""
    else:
        record["sha256"] = source_hash(files)
    writing = folder / f".{KEPT_FOLDER}"
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir()
    for name, file in files.items():
        (writing / name).parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".py":
            (writing / name).write_text(read_text(file), encoding="utf-8")
        else:
            shutil.copyfile(file, writing / name)
    (writing / RECORD_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")
    writing.rename(folder / KEPT_FOLDER)
    if files:
        _note_own_hash(record["sha256"])
    _warn_of_loose_imports(record["name"], files)


def _source_files(connector: Mapping[str, Any]) -> dict[str, Path]:
    """Return the files that the connector of a recipe needs beside vlbench; {} where it needs none.

    Those are of its own source and, as `mixed` takes them, of connectors that its options name.
    """
    source = registry.find_connector(connector["name"])
    if source.file is None:
        return {}
    files: dict[str, Path] = {}
    for value in connector.values():
        file = _own_connector_file(value) if isinstance(value, str) else None
        files |= own_source_files(file, _own_connector_file) if file is not None else {}
    if files and registry.is_shipped(source):
        files[source.file.name] = source.file
    return files


def _own_connector_file(name: str) -> Path | None:
    """Return the file of a connector; None for one that is shipped, of a package, or not there."""
    if name.endswith(".py"):
        sources = [registry.find_connector(name)] if Path(name).expanduser().is_file() else []
    else:
        sources = registry.find_connectors().get(name, [])
    own = [source.file for source in sources if source.file and not registry.is_shipped(source)]
    return own[0] if own else None


def _warn_of_loose_imports(name: str, files: Mapping[str, Path]) -> None:
    for module, place in loose_imports(files).items():
        print(
            f"vlbench: connector '{name}' imports {module} ({place}), which is not kept with the "
            "run: elsewhere its weights need that module too. What a connector imports relatively, "
            "as in 'from .parts import Block', is kept",
            file=sys.stderr,
        )


def note_own_callbacks(class_paths: Iterable[str]) -> None:
    """Note the callbacks of a run that this user starts, so that resuming it needs no trust."""
    for class_path in class_paths:
        _note_own_hash(_callback_hash(class_path))


def check_callbacks(class_paths: Iterable[object], source: str) -> None:
    """Raise a UserError for callbacks in the recipe `source` that no run of this user had."""
    paths = [str(path) for path in class_paths]
    unknown = [path for path in paths if not _is_own_hash(_callback_hash(path))]
    if unknown:
        raise UserError(
            f"{source} names callbacks that no run of yours had ({', '.join(unknown)}); their "
            f"modules run only with trainer.callbacks=[{','.join(paths)}] or trust_connector=true"
        )


def _callback_hash(class_path: str) -> str:
    return hashlib.sha256(f"callback {class_path}".encode()).hexdigest()


def copy_kept_source(source: Path, target: Path) -> None:
    """Copy the kept connector of one run or checkpoint to another, if it has one."""
    kept = source / KEPT_FOLDER
    if not has_kept_source(source):
        return
    for name, file in {**kept_source_files(kept), RECORD_FILE: kept / RECORD_FILE}.items():
        (target / KEPT_FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / KEPT_FOLDER / name)


def has_kept_source(folder: Path) -> bool:
    """Tell whether a run or checkpoint was made with a connector that is not shipped."""
    return (folder / KEPT_FOLDER / RECORD_FILE).is_file()


def kept_file(folder: Path, name: str) -> Path:
    """Return where a run or checkpoint would keep the file of a connector."""
    return folder / KEPT_FOLDER / f"{name}.py"


def has_only_source(connector: Mapping[str, Any], folder: Path) -> bool:
    """Tell whether a recipe's connector, or one that its options name, is known to `folder` alone.

    `folder` is a run or a checkpoint, or anything else that a model begins with.
    """
    named = [text for text in connector.values() if isinstance(text, str)]
    known = registry.find_connectors()
    return any(text not in known and kept_file(folder, text).is_file() for text in named)


def describe_other_source(connector: Mapping[str, Any], folder: Path) -> str:
    """Return how the source of a recipe's connector differs from that kept in `folder`, if so.

    A folder that keeps none says nothing, and "" is returned.
    """
    name = connector["name"]
    file = registry.find_connector(name).file
    kept = kept_file(folder, registry.connector_label(name))
    if file is None or not kept.is_file():
        return ""
    before, now = _compared_hashes(connector, kept.parent)
    if now == before:
        return ""
    return f"{file} (sha256 {now[:12]}) differs from {kept} ({before[:12]})"


def _compared_hashes(connector: Mapping[str, Any], kept_folder: Path) -> tuple[str, str]:
    """Return the hashes of a kept source, and of the same files as they are here now."""
    kept = kept_source_files(kept_folder)
    here = kept if _is_kept_folder(connector, kept_folder) else _source_files(connector)
    return source_hash(kept), source_hash({name: here[name] for name in kept if name in here})


def _is_kept_folder(connector: Mapping[str, Any], kept_folder: Path) -> bool:
    """Tell whether a recipe's connector is the file in that folder."""
    file = Path(str(connector["name"]))
    return file.suffix == ".py" and file.absolute().parent == kept_folder.absolute()


def locate_source(connector: Mapping[str, Any], folder: Path, trust: bool) -> str:
    """Return what to load for the connector of a run or checkpoint: a name, or a kept file.

    Args:
        connector: That of the recipe of `folder`: its name and its options.
        folder: A run or a checkpoint.
        trust: Whether the code of a folder that this user did not make may run.

    Raises:
        UserError: when the code is another's, or when its package is not installed.
    """
    name = str(connector["name"])
    if not has_kept_source(folder):
        return name
    record = read_json(folder / KEPT_FOLDER / RECORD_FILE)
    local = registry.find_connectors().get(name, [])
    if "entry_point" in record:
        if not local:
            raise UserError(
                f"connector '{name}' of {folder} came from package {record.get('package')} "
                f"{record.get('version')}, which is not installed"
            )
        return name
    kept = kept_file(folder, registry.connector_label(name))
    if not kept.is_file():
        raise UserError(f"{kept.parent} lacks {kept.name}, the source of connector '{name}'")
    local_file = local[0].file if len(local) == 1 else None
    kept_hash = source_hash(kept_source_files(kept.parent))
    if local_file is not None and _compared_hashes(connector, kept.parent)[1] == kept_hash:
        return name
    if not (trust or _is_own_hash(kept_hash)):
        raise UserError(
            f"{kept} (sha256 {kept_hash[:12]}) is code that came with {folder}; it runs only with "
            "trust_connector=true. Read it first"
        )
    reason = f"; {local_file} differs" if local_file is not None else ""
    print(f"vlbench: connector '{name}' is the one kept in {kept}{reason}", file=sys.stderr)
    return str(kept)


def _state_folder() -> Path:
    """Return where the hashes of this user's own connectors are noted (XDG's state folder)."""
    root = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(root).expanduser() / "vlbench" / "connectors"


def _note_own_hash(digest: str) -> None:
    try:
        _state_folder().mkdir(parents=True, exist_ok=True)
        (_state_folder() / digest).touch()
    except (OSError, RuntimeError) as error:  # no home, or one that cannot be written
        print(
            f"vlbench: {_state_folder_text()} cannot be written ({error}): outside of this folder, "
            "this run's connector and callbacks will ask for trust_connector=true",
            file=sys.stderr,
        )


def _state_folder_text() -> str:
    with contextlib.suppress(RuntimeError):
        return str(_state_folder())
    return "the user's state folder"


def _is_own_hash(digest: str) -> bool:
    try:
        return (_state_folder() / digest).is_file()
    except RuntimeError:  # no home
        return False
