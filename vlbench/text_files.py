"""Small text files in UTF-8; what is wrong with one is a UserError that names it."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from io import BufferedRandom
from pathlib import Path
from typing import Any, TextIO

from vlbench.errors import UserError, escape_in_json, escape_surrogates, one_line, printable_text
from vlbench.regular_files import (
    CHUNK_BYTES,
    MAX_CONFIG_BYTES,
    MAX_RECORDS_BYTES,
    irregular_kind,
    open_regular,
    open_to_append,
    read_regular,
    read_regular_text,
    read_until_zero,
)

LFS_POINTER = b"version https://git-lfs"
MAX_YAML_BYTES = 1 << 18  # fifty times a recipe; PyYAML reads 40 kB in a second


def read_text(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> str:
    """Return the text of a file without its byte-order mark."""
    refuse_lfs_pointer(path)
    try:
        text = read_regular_text(path, max_bytes)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start + 1})") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(
    text: str | bytes, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """Return the value of a JSON text; a ValueError also where it is nested too deeply.

    `object_pairs_hook` makes the objects, as of `json.loads`.
    """
    try:
        return json.loads(text, object_pairs_hook=object_pairs_hook)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    text = read_text(path)
    try:
        value = parse_json(text)
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: is not a JSON object")
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; a UserError names the file and, if known, the line."""
    from omegaconf import OmegaConf  # here, as few need it and it takes a while
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    text = io.StringIO(read_text(path, MAX_YAML_BYTES))
    try:
        tree = OmegaConf.to_container(OmegaConf.load(text), resolve=False)
    except RecursionError as error:
        raise UserError(f"{path}: its lists or mappings are nested too deeply") from error
    except (YAMLError, OmegaConfBaseException, ValueError, OSError) as error:  # or of a number
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or one_line(error, max_lines=1)
        raise UserError(f"{path}{line}: {problem}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: is not a mapping of keys, KEY: VALUE lines")
    return _with_text_keys(tree)


def format_yaml(tree: dict[str, Any]) -> str:
    """Return a mapping as YAML; texts that YAML would read as numbers are quoted."""
    from omegaconf import OmegaConf

    return str(OmegaConf.to_yaml(OmegaConf.create(tree)))


def _with_text_keys(tree: dict[Any, Any]) -> dict[str, Any]:
    """Return a tree of YAML in which a key such as 1 or true is text."""
    return {
        str(key): _with_text_keys(value) if isinstance(value, dict) else value
        for key, value in tree.items()
    }


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file with a header, [] if there is no such file."""
    return (
        list(csv.DictReader(io.StringIO(read_text(path, MAX_RECORDS_BYTES))))
        if path.is_file()
        else []
    )


def split_lines(text: str) -> list[str]:
    """Return the lines of a text without the line feeds that end them.

    str.splitlines would also cut at U+2028, U+2029 and U+0085, which JSON texts may hold as they
    are, and at control characters.
    """
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def format_json(value: object, indent: int | None = None) -> str:
    """Return a value as JSON that can be shown: all scripts as they are, control characters not."""
    return escape_in_json(json.dumps(value, ensure_ascii=False, indent=indent))


def format_json_lines(records: Iterable[object]) -> str:
    """Return records as JSON, one to a line, each as `format_json` writes it."""
    return "".join(f"{format_json(record)}\n" for record in records)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file written by `format_json_lines`, [] if there is no such file.

    A last line that a kill has cut short is left out, and so are the zeros that some file systems
    leave after a crash. Any other broken line is a UserError.
    """
    if not path.is_file():
        return []
    try:
        data, _ = read_until_zero(path, MAX_RECORDS_BYTES)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    records = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].split(b"\n")[:-1], 1):
        try:
            record = parse_json(line.decode("utf-8-sig"))
        except ValueError as error:
            raise UserError(f"{path}: line {number} is not JSON ({error})") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}: line {number} is not a JSON object")
        records.append(record)
    return records


def append_json_lines(path: Path, records: Iterable[object], is_synced: bool = False) -> None:
    """Append records to a file of `format_json_lines`; a last line that a kill cut is removed.

    With `is_synced` they are on the disk when this returns.
    """
    with name_written_file(path), _open_to_append(path) as file:
        file.truncate(_end_of_last_line(file))
        file.write(format_json_lines(records).encode("utf-8"))
        if is_synced:
            file.flush()
            os.fsync(file.fileno())


def _end_of_last_line(file: BufferedRandom) -> int:
    """Return the position after the last line feed of a file, 0 where it has none."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - CHUNK_BYTES)
        file.seek(start)
        position = file.read(end - start).rfind(b"\n")
        if position >= 0:
            return start + position + 1
        end = start
    return 0


@contextlib.contextmanager
def append_text(path: Path) -> Iterator[TextIO]:
    """Open a text for appending until the end of `with`; line ends are written as they are.

    A UserError for what is no regular file, a link among them.
    """
    with (
        name_written_file(path),
        _open_to_append(path) as file,
        io.TextIOWrapper(file, encoding="utf-8", newline="") as text,
    ):
        yield text


def _open_to_append(path: Path) -> BufferedRandom:
    try:
        return open_to_append(path)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def write_for_people(path: Path, text: str) -> None:
    """Write a text that is read on a terminal: control characters but line feeds are escaped."""
    write_atomically(path, printable_text(escape_surrogates(text)))


def write_atomically(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it, so that it is never seen half-written."""
    with replace_when_written(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


@contextlib.contextmanager
def replace_when_written(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which takes its place at the end of `with`.

    Several processes, also of several machines, may write the same at the same time. What cannot be
    written whole is removed; the OSError names `path`.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        kind = irregular_kind(path.stat())
        raise OSError(errno.EINVAL, f"is {kind} and not a file", str(path))
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with name_written_file(path, temporary):
        try:
            temporary.unlink(missing_ok=True)  # else a link or a pipe of that name would be written
            yield temporary
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):  # its folder is gone, or a file
                temporary.unlink()


@contextlib.contextmanager
def name_written_file(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Let an OSError name `path`, if it names no file (as that of a full disk) or `temporary`."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary or path)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_config_bytes(path: Path) -> bytes:
    """Return the bytes of a small file, such as a tokenizer's."""
    try:
        return read_regular(path, MAX_CONFIG_BYTES)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def refuse_lfs_pointer(path: Path, max_bytes: int | None = None) -> None:
    """Raise a UserError for a file that Git LFS has not fetched, or that cannot be opened.

    Also for one that is larger than `max_bytes`, or no regular file.
    """
    try:
        with open_regular(path, max_bytes) as file:
            first_bytes = file.read(len(LFS_POINTER))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if first_bytes == LFS_POINTER:
        raise UserError(f"{path}: is a Git-LFS pointer and not the file; run git lfs pull")
