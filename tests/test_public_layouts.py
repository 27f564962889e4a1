"""Layouts that published data sets have, and the accidents of their files: read, or a line each."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlbench.data.conversation_files import ConversationFiles
from vlbench.data.sample import IMAGE_PLACEHOLDER as P
from vlbench.data.sample import Sample
from vlbench.data.shards import WebDatasetShards
from vlbench.errors import BadSample, UserError

TURNS = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
PAIRS = [{"user": "Q", "assistant": "A"}]
IMAGE_STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})
TEXTS = [f"{P}\nQ", "A"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("layouts")
    Image.new("RGB", (9, 8), "red").save(path / "a b.jpg")
    return path


def picture() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (9, 8), "red").save(stream, "JPEG")
    return stream.getvalue()


def stored() -> dict[str, Any]:
    return {"bytes": picture(), "path": None}


def read(source: Any) -> list[list[str] | str]:
    """Return the texts of each sample, or what is wrong with it; its images are opened."""
    found: list[list[str] | str] = []
    for number in range(len(source)):
        try:
            sample: Sample = source[number]
            assert all(image.open().size == (9, 8) for image in sample.images)
            found.append([turn.text for turn in sample.turns])
        except BadSample as bad:
            assert "\n" not in str(bad)
            found.append(bad.reason)
    return found


# name: (record, texts of its turns, or a part of what is wrong)
RECORDS: dict[str, tuple[dict[str, Any], list[str] | str]] = {
    "ms-swift's pairs": (
        {"system": "S", "conversation": [{"human": "Q", "assistant": "A"}], "images": ["a b.jpg"]},
        ["S", *TEXTS],
    ),
    "ms-swift's boxes": (
        {
            "messages": [
                {"role": "user", "content": "<image>Find <ref-object>"},
                {"role": "assistant", "content": "<bbox>"},
            ],
            "images": ["a b.jpg"],
            "objects": {"ref": ["dog"], "bbox": [[1, 2, 3, 4]]},
        },
        "turn 1: '<ref-object>' stands for an entry of 'objects', which is not read",
    ),
    "ViP-LLaVA's boxes": (
        {
            "image": "a b.jpg",
            "bboxes": [[1, 2, 3, 4]],
            "conversations": [{"from": "human", "value": "<image>What is <bbox0>?"}, TURNS[1]],
        },
        "turn 1: '<bbox0>' stands for an entry of 'bboxes'",
    ),
    "boxes as text": (
        {
            "image": "a b.jpg",
            "bbox": [1, 2, 3, 4],
            "conversations": [TURNS[0], {"from": "gpt", "value": "<bbox>1, 2, 3, 4</bbox>"}],
        },
        [f"{P}\nQ", "<bbox>1, 2, 3, 4</bbox>"],
    ),
    "LRV-Instruct, its image by its id": (
        {"image_id": "2392588", "question": "Q", "answer": "A", "task": "existence"},
        "'image_id' is a text (\"2392588\"), and the record has no image",
    ),
    "no image by its id": ({"image_id": -1, "question": "Q", "answer": "A"}, ["Q", "A"]),
    "a page beside a question": (
        {"url": "https://x.org/wiki/Dog", "question": "Q", "answer": "A"},
        ["Q", "A"],
    ),
    "an image's address beside a question": (
        {"url": "https://x/y.jpg", "question": "Q", "answer": "A"},
        "'url' is a text (\"https://x/y.jpg\"), a URL; download it",
    ),
    "the address of the image in metadata": (
        {"image": "a b.jpg", "conversations": TURNS, "meta": {"url": "https://x/y.jpg", "by": "Z"}},
        TEXTS,
    ),
    "another image in metadata": (
        {"image": "a b.jpg", "conversations": TURNS, "meta": {"file": "y.jpg", "by": "Z"}},
        "'meta' is not read",
    ),
    "Qwen-VL's address of a file": (
        {"image": "file://FOLDER/a%20b.jpg", **{"conversations": TURNS}},
        TEXTS,
    ),
    "a data URL without a type": (
        {
            "image": f"data:;base64,{base64.b64encode(picture()).decode()}",
            "conversations": TURNS,
        },
        TEXTS,
    ),
    "a path with its size": (
        {"image": {"path": "a b.jpg", "width": 9, "height": 8}, "conversations": TURNS},
        TEXTS,
    ),
    "several captions": (
        {"image": "a b.jpg", "caption": ["A", "B"]},
        "turn 2: 'caption' is a list",
    ),
    "an answer of blanks": (
        {"image": "a b.jpg", "question": "Q", "answer": " "},
        "turn 2: the text of 'answer' is empty",
    ),
    "pixels": ({"image": [255, 216], "caption": "A"}, "entry 1 of 'image' is a number (255)"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record(folder, name):
    record, expected = RECORDS[name]
    file = folder / "records.json"
    file.write_text(json.dumps([record]).replace("FOLDER", str(folder)))
    (found,) = read(ConversationFiles(file))
    assert found == expected if isinstance(expected, list) else expected in found


def test_a_path_of_windows_is_missing_with_a_reason(folder):
    record = {"image": "images\\a b.jpg", "conversations": TURNS}
    (folder / "windows.json").write_text(json.dumps([record]))
    source = ConversationFiles(folder / "windows.json")
    (bad,) = source.find_bad_samples()
    assert bad.reason.endswith("does not exist; folders are separated by /, not by \\")
    with pytest.raises(UserError, match="separated by /"):
        source[0].images[0].open()


def test_a_data_url_without_base64_is_named(folder):
    (folder / "url.json").write_text(json.dumps([{"image": "data:,x", "conversations": TURNS}]))
    image = ConversationFiles(folder / "url.json")[0].images[0]
    with pytest.raises(UserError, match="record 1: is a data URL without base64"):
        image.open()


@pytest.mark.parametrize(
    "text",
    [
        f'{{"image": "x.jpg", "image": "a b.jpg", "conversations": {json.dumps(TURNS)}}}',
        '{"conversations": [{"from": "human", "value": "Q", "value": "R"}]}',
    ],
)
def test_a_key_with_two_values_is_named_and_none_is_lost(folder, text):
    (folder / "twice.jsonl").write_text(
        f'{text}\n{{"id": 1, "id": 1, "texts": {json.dumps(PAIRS)}}}'
    )
    first, second = read(ConversationFiles(folder / "twice.jsonl"))
    assert "more than once, with different values" in first and second == ["Q", "A"]


# name: (columns and their types, texts of the first row, or a part of what is wrong)
COLUMNS: dict[str, tuple[dict[str, Any], list[str] | str]] = {
    "FineVision": (
        {
            "images": pa.array([[stored()]], pa.list_(IMAGE_STRUCT)),
            "texts": [PAIRS],
            "source": ["vqav2"],
            **{
                f"{name}_{kind}": [[4] if kind == "ratings" else 4]
                for name in ("relevance", "visual_dependency", "image_correspondence", "formatting")
                for kind in ("ratings", "min")
            },
        },
        TEXTS,
    ),
    "shards that became rows": (
        {
            "jpg": pa.array([stored()], IMAGE_STRUCT),
            "txt": ["A"],
            "json": [{"url": "https://x/y.jpg", "caption": "A"}],
            "__key__": ["0"],
            "__url__": ["x.tar"],
        },
        [P, "A"],
    ),
    "an image of an unknown key": (
        {
            "image": pa.array([stored()], IMAGE_STRUCT),
            "scan": pa.array([stored()], IMAGE_STRUCT),
            "caption": ["A"],
        },
        "'scan' is not read; name the file in 'image'",
    ),
    "bytes of an unknown key": (
        {"image": [picture()], "scan": [picture()], "caption": ["A"]},
        "'scan' is not read",
    ),
    "an image with its size": (
        {"image": [{"bytes": picture(), "path": None, "height": 8, "width": 9}], "caption": ["A"]},
        [P, "A"],
    ),
    **{
        f"nanoseconds of {kind}": (
            {"image": [picture()], "caption": ["A"], "when": pa.array([123456789123], kind)},
            [P, "A"],
        )
        for kind in (pa.timestamp("ns"), pa.timestamp("ns", "UTC"), pa.duration("ns"))
    },
    "nanoseconds inside of a mapping": (
        {
            "image": [picture()],
            "caption": ["A"],
            "metadata": pa.array(
                [{"made": [123456789123]}], pa.struct([("made", pa.list_(pa.timestamp("ns")))])
            ),
        },
        [P, "A"],
    ),
    "a day that no calendar has": (
        {"image": [picture()], "caption": ["A"], "when": pa.array([1 << 30], pa.date32())},
        "column 'when' cannot be read",
    ),
    "a text that is not UTF-8": (
        {
            "image": [picture()],
            "caption": pa.Array.from_buffers(
                pa.string(),
                1,
                [None, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"a\xff")],
            ),
        },
        "column 'caption' cannot be read ('utf-8' codec",
    ),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_row_of_a_parquet_file(folder, name):
    columns, expected = COLUMNS[name]
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    (found,) = read(ConversationFiles(folder / "rows.parquet"))
    assert found == expected if isinstance(expected, list) else expected in found


def test_a_column_that_is_there_twice_is_named(folder):
    arrays = [pa.array(["a b.jpg"]), pa.array(["A"]), pa.array(["B"])]
    table = pa.Table.from_arrays(arrays, ["image", "caption", "caption"])
    pq.write_table(table, folder / "twice.parquet")
    (folder / "twice.csv").write_text("image,caption,caption\na b.jpg,A,B\n")
    for name in ("twice.parquet", "twice.csv"):
        with pytest.raises(UserError, match=r"'caption' (is there twice|more than once)"):
            ConversationFiles(folder / name)


NEVER, BEHIND = "cell 2 that is never closed", "text behind the closing quote of cell 2"
TABLES: dict[str, tuple[str, list[str]]] = {
    "an index of pandas": (",image,caption\n0,a b.jpg,A\n1,a b.jpg,B\n", ["A", "B"]),
    "semicolons": ("image;caption\na b.jpg;A, and B\n", ["A, and B"]),
    "a quote that is never closed": (
        'image,caption\na b.jpg,"A\na b.jpg,B\na b.jpg,C\n',
        [NEVER, "B", "C"],
    ),
    "quotes that are text": (
        'image\tcaption\na b.jpg\t"A" and B\na b.jpg\t"C\na b.jpg\tD "E"\na b.jpg\t5" F\n',
        [BEHIND, NEVER, 'D "E"', '5" F'],
    ),
    "rows of a TSV inside of two quotes": (
        'image\tcaption\na b.jpg\t"A\na b.jpg\tB"\na b.jpg\tC\n',
        [NEVER, 'B"', "C"],
    ),
    "lines inside of quotes": (
        'image,caption\r\na b.jpg,"A,\r\n\r\n""B"""\r\n  \r\na b.jpg,C\r\n',
        ['A,\r\n\r\n"B"', "C"],
    ),
    "a long cell with quotes": (
        f'image,caption\na b.jpg,"{"A " * 70_000}""B"""\n',
        ["A " * 70_000 + '"B"'],
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_no_row_of_a_table_is_lost_or_changed(folder, name):
    text, expected = TABLES[name]
    (folder / "table.csv").write_text(text, newline="")
    found = read(ConversationFiles(folder / "table.csv"))
    assert len(found) == len(expected)
    for one, words in zip(found, expected, strict=True):
        assert one == [P, words] if isinstance(one, list) else words in one


FILES = {
    "UTF-16": (json.dumps([]).encode("utf-16"), "is text in UTF-16; save it as UTF-8"),
    "a table in UTF-16": ("image,caption\n".encode("utf-16"), "is text in UTF-16"),
    "a comment": (b'// mine\n[{"id": 1}]', "line 1 begins with '// mine'; expected a JSON list"),
    "line ends of CR": (b"image,caption\ra.jpg,A\r", "line 1 begins with 'image,caption"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_kind_is_one_line(tmp_path, name):
    content, words = FILES[name]
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        ConversationFiles(tmp_path / "data.json")
    assert words in str(caught.value) and "\n" not in str(caught.value)


FOLDERS = {
    "JSON lines": (["a.jsonl", "b.jsonl"], r"several in data\.mix: .*a\.jsonl, .*b\.jsonl"),
    "save_to_disk": (["data-00000-of-00001.arrow", "state.json"], "it holds Arrow files"),
    "tar files": (["000.tar"], r"it holds tar files: give .*/\*\.tar"),
    "pictures": (["a.jpg"], "it holds no file of JSON, Parquet or a table"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_of_a_folder_that_is_no_data_it_is_said_what_to_give(tmp_path, name):
    files, words = FOLDERS[name]
    for file in files:
        (tmp_path / file).write_text("")
    for reader in (ConversationFiles, WebDatasetShards):
        with pytest.raises(UserError, match=words):
            reader(tmp_path)


def test_a_pattern_and_a_missing_folder_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    for name, words in (
        ("*.jsonl", "a pattern may name tar files alone"),
        ("x/a.json", "no folder"),
    ):
        with pytest.raises(UserError, match=words):
            ConversationFiles(tmp_path / name)


PARTS = [{"type": "image"}, {"type": "text", "text": "Q"}]
MEMBERS: dict[str, tuple[Any, list[str] | str]] = {
    "a question": ({"image_id": 7, "question": "Q", "answer": "A"}, TEXTS),
    "pairs": ({"texts": PAIRS}, TEXTS),
    "parts": (
        {"messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "A"}]},
        TEXTS,
    ),
    "a caption with its file": ({"file_name": "0.jpg", "caption": "A"}, [P, "A"]),
    "a caption that is its prompt": ({"prompt": "A", "text": "A"}, [P, "A"]),
    "a question beside a caption": (
        {"question": "Q", "text": "A"},
        "'question' is not read beside a caption ('text')",
    ),
    "a question of POPE": (
        {"question_id": 3, "text": "Is there a dog?", "label": "no"},
        "'text' is a question, as the record has 'question_id'",
    ),
    "the letter of a column": (
        {"question": "Q", "answer": "B", "A": "red", "B": "blue"},
        "the answer is 'B', one of the options A B",
    ),
    "a key twice": ('{"caption": "A", "caption": "B"}', "'caption' more than once"),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_shards_have_the_dialects_of_files(tmp_path, name):
    record, expected = MEMBERS[name]
    text = record if isinstance(record, str) else json.dumps(record)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for ending, data in (("jpg", picture()), ("json", text.encode())):
            member = tarfile.TarInfo(f"0.{ending}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (found,) = read(WebDatasetShards(tmp_path / "x.tar"))
    assert found == expected if isinstance(expected, list) else expected in found
