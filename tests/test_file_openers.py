"""Every file that was there before is opened in one way, also those that vlbench itself writes."""

from __future__ import annotations

import ast
import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_hostile_files import NOT_FILES, sparse

from vlbench.compare.experiment.run_jobs import LOG_TAIL_BYTES, TrainingJob
from vlbench.data.shard_index import load_shard_summary
from vlbench.errors import UserError
from vlbench.file_lock import LOCK_FILE, hold_lock, is_held_here
from vlbench.text_files import (
    append_json_lines,
    append_text,
    read_json_lines,
    write_atomically,
)

PACKAGE = Path(__file__).parents[1] / "vlbench"
ALLOWED = {
    "regular_files.py: open": "the one way",
    "file_lock.py: read_text": "the system's own files in /proc",
    "file_lock.py: open": "makes a new file",
    "core_sharing.py: read_text": "the system's own files in /proc",
    "distributed/machine_limits.py: open": "the system's own files in /proc",
    "distributed/machine_limits.py: read_text": "the system's own files in /sys",
    "distributed/process_group.py: open": "the null device, written",
    "encoder_names.py: read_text": "files of the package open_clip",
    "miniatures/__main__.py: read_text": "vlbench's own files",
    "miniatures/__main__.py: read_bytes": "vlbench's own files",
    "serve/page_files.py: read_bytes": "vlbench's own files",
    "model/weights/tensor_layout.py: open": "makes new files",
    "model/weights/tensor_files.py: safe_open": "behind refuse_lfs_pointer, as torch.load there",
    "data/feature_store.py: safe_open": "regular files of the user's own cache",
    "data/feature_store.py: read_bytes": "ImageFile's",
    "data/record_images.py: read_bytes": "EmbeddedImage's own",
    "check/check_command.py: open": "makes a new file",
    "data/write_shards.py: read_bytes": "ImageFile's",
    "evaluate/tasks/benchmark_records.py: read_bytes": "ImageFile's",
}


def raw_readers(source: str) -> Iterator[str]:
    """Yield the calls in a source that open a path by themselves."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name) and function.id in ("open", "safe_open"):
            yield function.id
        elif isinstance(function, ast.Attribute):
            given = [*node.args[:1], *(word.value for word in node.keywords)]
            has_mode = any(isinstance(one, ast.Constant) for one in given)
            is_path = ast.unparse(function.value) not in ("os", "Image", "tarfile")
            if function.attr in ("read_text", "read_bytes"):
                yield function.attr
            elif function.attr == "open" and has_mode and is_path:
                yield "open"


def test_no_module_opens_files_in_its_own_way():
    found = {
        f"{file.relative_to(PACKAGE).as_posix()}: {name}"
        for file in PACKAGE.rglob("*.py")
        for name in raw_readers(file.read_text())
    }
    assert found == ALLOWED.keys(), found ^ ALLOWED.keys()


def test_the_scan_sees_what_opens_a_path():
    for text in ("open(path)", "path.open('rb')", "path.open(encoding='utf-8')", "a.read_text()"):
        assert list(raw_readers(text)), text
    for text in ("read_text(path)", "Image.open(stream)", "os.open(path, flags)", "image.open()"):
        assert not list(raw_readers(text)), text


LOCKS: dict[str, tuple[Callable[[Path], object], str]] = {
    **NOT_FILES,
    "large": (sparse(b"{", 1 << 40), "has 1100 GB"),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), "is a link to nothing"),
}


@pytest.mark.parametrize("kind", LOCKS)
def test_what_is_no_lock_file_is_one_line(kind, tmp_path):
    make, words = LOCKS[kind]
    make(tmp_path / LOCK_FILE)
    with pytest.raises((UserError, OSError), match=words):
        with hold_lock(tmp_path / LOCK_FILE, "run=r"):
            raise AssertionError("it must not be held")
    with pytest.raises((UserError, OSError), match=words):
        is_held_here(tmp_path / LOCK_FILE)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{}", "[1]", '{"host": 1, "boot": 2, "pid": "x", "started": 3}']
)
def test_a_lock_file_with_anything_in_it_belongs_to_nobody_known(text, tmp_path):
    (tmp_path / LOCK_FILE).write_text(text[: 1 << 15])
    assert not is_held_here(tmp_path / LOCK_FILE)


def test_a_lock_of_a_process_that_no_system_has(tmp_path):
    holder = {"host": "h", "boot": "b", "pid": 10**30, "started": "1"}
    (tmp_path / LOCK_FILE).write_text(json.dumps(holder))
    assert not is_held_here(tmp_path / LOCK_FILE)


APPENDERS = {
    "lines": lambda path: append_json_lines(path, [{"a": 1}]),
    "text": lambda path: append_text(path).__enter__().write("a"),
}


@pytest.mark.parametrize("kind", NOT_FILES)
@pytest.mark.parametrize("way", APPENDERS)
def test_nothing_is_appended_to_what_is_no_file(way, kind, tmp_path):
    """A link leads out of a folder that came from others: to any file of the user's."""
    make, words = NOT_FILES[kind]
    make(tmp_path / "file")
    is_link = (tmp_path / "file").is_symlink()
    with pytest.raises((UserError, OSError), match="is a link" if is_link else f"{words}|Is a dir"):
        APPENDERS[way](tmp_path / "file")


@pytest.mark.parametrize("way", APPENDERS)
def test_a_link_to_a_file_of_the_user_is_not_written(way, tmp_path):
    (tmp_path / "own").write_text("mine\n")
    (tmp_path / "file").symlink_to("own")
    with pytest.raises(UserError, match="file: is a link, not a file"):
        APPENDERS[way](tmp_path / "file")
    assert (tmp_path / "own").read_text() == "mine\n"


def test_what_lies_where_a_temporary_file_is_written(tmp_path, monkeypatch):
    unique = uuid.UUID(int=7)
    monkeypatch.setattr(uuid, "uuid4", lambda: unique)
    (tmp_path / "own").write_text("mine")
    temporary = tmp_path / f".a.json.{unique.hex}"
    for make in (lambda: os.mkfifo(temporary), lambda: temporary.symlink_to("own")):
        make()
        write_atomically(tmp_path / "a.json", "new")
        assert (tmp_path / "a.json").read_text() == "new"
    assert (tmp_path / "own").read_text() == "mine"


def test_zeros_behind_lines_are_cut_off_as_a_crash_leaves_them(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": 1}\n{"a"')
    os.truncate(file, 6 << 30)
    assert read_json_lines(file) == [{"a": 1}]
    os.truncate(file, 100 << 20)
    append_json_lines(file, [{"a": 2}])
    assert file.read_bytes() == b'{"a": 1}\n{"a": 2}\n'


def test_the_last_line_of_an_endless_log(tmp_path):
    job = TrainingJob("t", (), tmp_path / "run")
    with job.log_file.open("wb") as file:
        file.seek(50 << 30)
        file.write(b"x" * LOG_TAIL_BYTES + b"\nvlbench: the end\n\n")
    assert job.last_log_line == "the end"


HEADERS: dict[str, object] = {
    **{f"samples {value!r}": {"samples": value} for value in (10**15, -1, "many", None, True)},
    **{f"left out {value!r}": {"left_out": value} for value in (7, [1], {"a": "b"}, None)},
    "fault": {"fault": 5},
    "size": {"size": "1"},
    "time": {"mtime": "1"},
}


@pytest.mark.parametrize("name", HEADERS)
def test_the_first_line_of_an_index_is_not_believed(name, tmp_path, monkeypatch):
    """The shard is scanned, as if there were no index."""
    monkeypatch.setattr("vlbench.data.shard_index.file_stamp", lambda tar: None)
    scanned: list[str] = []
    monkeypatch.setattr(
        "vlbench.data.shard_index._build_index", lambda tar: scanned.append(tar) or _NoSamples()
    )
    header = {"version": 2, "size": 0, "mtime": None, "samples": 1, "fault": "", "left_out": {}}
    (tmp_path / "a.tar.index").write_text(json.dumps({**header, **HEADERS[name]}) + "\n")
    load_shard_summary(str(tmp_path / "a.tar"))
    assert scanned


class _NoSamples:
    left_out: dict[str, int] = {}
    fault = ""

    def __len__(self) -> int:
        return 0
