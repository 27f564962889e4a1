"""One's own connector stays with what it was trained to do: its source is kept beside the weights.

A run and each of its checkpoints have a folder `connector` with the file, those of its folder that
it imports, and `source.json`. They are used wherever `./connectors` does not have the same text.
Code runs from there only if this user made a run with it, or with `trust_connector=true`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlbench.connector import registry
from vlbench.connector.source_files import RECORD_FILE, own_source_files, source_hash
from vlbench.errors import UserError
from vlbench.text_files import read_json, read_text

KEPT_FOLDER = "connector"
"""Name of the folder in a run and in a checkpoint."""


def keep_source(name: str, folder: Path) -> None:
    """Keep the source of a connector in the new folder of a run; shipped ones need none.

    Its hash is noted in the user's state folder, so that this user's own runs need no trust. Of a
    connector of another package, its name and version are recorded.
    """
    source = registry.find_connector(name)
    if source.file is not None and source.file.parent.resolve() == registry.shipped_folder(
        "connectors"
    ):
        return
    record: dict[str, Any] = {"name": registry.connector_label(name)}
    files: list[Path] = []
    if source.file is not None:
        files = own_source_files(source.file)
        record["sha256"] = source_hash(files)
    elif source.entry_point is not None:
        distribution = source.entry_point.dist
        record["entry_point"] = source.entry_point.value
        record["package"] = distribution.name if distribution else ""
        record["version"] = distribution.version if distribution else ""
    writing = folder / f".{KEPT_FOLDER}"
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir()
    for file in files:
        (writing / file.name).write_text(read_text(file), encoding="utf-8")
    (writing / RECORD_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")
    writing.rename(folder / KEPT_FOLDER)
    if files:
        _note_own_hash(record["sha256"])


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
    for file in sorted((source / KEPT_FOLDER).glob("*")):
        if file.is_file():
            (target / KEPT_FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(file, target / KEPT_FOLDER / file.name)


def has_kept_source(folder: Path) -> bool:
    """Tell whether a run or checkpoint was made with a connector that is not shipped."""
    return (folder / KEPT_FOLDER / RECORD_FILE).is_file()


def describe_other_source(name: str, folder: Path) -> str:
    """Return how the source of a connector differs from that kept in `folder`; "" if it does not.

    A folder that keeps none says nothing.
    """
    file = registry.find_connector(name).file
    kept = folder / KEPT_FOLDER / f"{registry.connector_label(name)}.py"
    if file is None or not kept.is_file():
        return ""
    now, before = (source_hash(own_source_files(path))[:12] for path in (file, kept))
    return "" if now == before else f"{file} (sha256 {now}) differs from {kept} ({before})"


def locate_source(name: str, folder: Path, trust: bool) -> str:
    """Return what to load for the connector `name` of a run or checkpoint: a name, or a kept file.

    Args:
        name: The connector's name in the recipe of `folder`.
        folder: A run or a checkpoint.
        trust: Whether the code of a folder that this user did not make may run.

    Raises:
        UserError: when the code is another's, or when its package is not installed.
    """
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
    kept = folder / KEPT_FOLDER / f"{registry.connector_label(name)}.py"
    if not kept.is_file():
        raise UserError(f"{kept.parent} lacks {kept.name}, the source of connector '{name}'")
    kept_hash = source_hash(own_source_files(kept))
    local_file = local[0].file if len(local) == 1 else None
    if local_file is not None and source_hash(own_source_files(local_file)) == kept_hash:
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
