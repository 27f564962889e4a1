"""Folders of Parquet files: every file of a split is read once, or what is wrong is a line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from test_parquet_records import row, write_rows

from vlbench.data.conversation_files import ConversationFiles
from vlbench.data.data_sources import _is_shards
from vlbench.data.parquet_files import iterate_parquet_files
from vlbench.errors import UserError


def ids(location: str | Path) -> list[str]:
    source = ConversationFiles(location)
    return [source[number].id for number in range(len(source))]


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder with a subset, and a link to another one on another disk."""
    write_rows(tmp_path / "all/a/train-00000-of-00001.parquet", [row(1)])
    write_rows(tmp_path / "far/train-00000-of-00001.parquet", [row(2), row(3)])
    (tmp_path / "all/b").symlink_to(tmp_path / "far")
    return tmp_path / "all"


def test_folders_behind_links_are_read(linked):
    assert ids(linked) == ["1", "2", "3"]
    (linked / "a").rename(linked.parent / "near")
    assert ids(linked) == ["2", "3"] and not _is_shards(str(linked))


def test_a_folder_that_two_paths_lead_to_is_read_once_and_a_circle_ends(linked):
    (linked / "latest").symlink_to("a")
    (linked / "a/up").symlink_to("..")
    assert ids(linked) == ["1", "2", "3"]


def test_hidden_files_are_passed_over_and_a_folder_of_that_suffix_is_none(linked):
    write_rows(linked / ".cache/train-00000-of-00001.parquet", [row(4)])
    write_rows(linked / "lost+found/train-00000-of-00001.parquet", [row(5)])
    write_rows(linked / "c.parquet/train-00000-of-00001.parquet", [row(6)])
    assert ids(linked) == ["1", "2", "3", "6"]


def test_a_folder_that_may_not_be_read_is_named(linked, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"all/b: cannot be read \(Permission denied\)"):
        ConversationFiles(linked)


def test_a_link_to_nothing_is_named(linked):
    (linked / "a/part.0.parquet").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"part\.0\.parquet is a link to nothing"):
        list(iterate_parquet_files(linked))


def test_a_folder_tells_the_split_where_the_numbered_name_does_not(tmp_path):
    write_rows(tmp_path / "train/part-00000-of-00001.parquet", [row(1)])
    write_rows(tmp_path / "test/part-00000-of-00001.parquet", [row(2)])
    assert ids(tmp_path) == ["1"] and ids(f"{tmp_path}:test") == ["2"]
    with pytest.raises(UserError, match=r"has no split 'part'; it has test, train"):
        ConversationFiles(f"{tmp_path}:part")


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            "train-00000-of-00001",
            "train-00000-of-00002",
            "-*-of-00001 and train-*-of-00002, a split",
        ),
        ("train-00000-of-00001-ab", "train-00000-of-00001-cd", "are the same part of a split"),
    ],
)
def test_a_split_that_was_written_twice_is_not_read_twice(tmp_path, first, second, message):
    for name in (first, second):
        write_rows(tmp_path / f"data/{name}.parquet", [row(1)])
    with pytest.raises(UserError) as caught:
        ConversationFiles(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_metadata_beside_the_tar_files_of_img2dataset_are_no_samples(tmp_path):
    write_rows(tmp_path / "00000.parquet", [row(1)])
    (tmp_path / "00000.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"as img2dataset writes them: give .*/\*\.tar"):
        ConversationFiles(tmp_path)
