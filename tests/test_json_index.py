"""Records of JSON files and tables are found once, by their bytes, and read one by one."""

from __future__ import annotations

import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlbench.data import json_scan, kept_numbers, record_offsets
from vlbench.data.conversation_files import ConversationFiles
from vlbench.data.json_records import JsonRecords
from vlbench.data.json_scan import scan_json
from vlbench.data.table_records import TableRecords
from vlbench.errors import BadSample, UserError


def record(number: int, text: str = "是 red") -> dict[str, Any]:
    turns = [{"from": "human", "value": f"{number}?"}, {"from": "gpt", "value": text}]
    return {"id": str(number), "conversations": turns}


@pytest.fixture(params=[1, 7, 64, 1 << 24])
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The size of a chunk: records are cut by it at every place."""
    monkeypatch.setattr(json_scan, "CHUNK_BYTES", request.param)
    return int(request.param)


def odd_values() -> list[Any]:
    """Return values whose text is cut by chunks at odd places."""
    draw = random.Random(0)
    texts = ['"', "\\", "\U0001f600", "é", "]", "},{", "\n", "a" * 300, "\u2028"]
    return [
        {"id": "".join(draw.choices(texts, k=draw.randrange(6))), "n": draw.choice(numbers)}
        for numbers in ([1, -1.5e-300, None, True, [], {}, [[{"a": "]"}]]],) * 60
    ]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_is_found_whatever_its_layout(tmp_path, chunk_bytes, indent, ascii_only):
    values = odd_values()
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    file = tmp_path / "data"
    file.write_bytes(b"\xef\xbb\xbf" * (indent is None) + text.encode())
    records = JsonRecords(file)
    assert [records.read_record(number) for number in range(len(records))] == values


@pytest.mark.parametrize("indent", [None, 2])
def test_records_one_after_another_are_found(tmp_path, chunk_bytes, indent):
    values = [record(number) for number in range(9)]
    lines = [json.dumps(value, indent=indent, ensure_ascii=False) for value in values]
    (tmp_path / "data.json").write_text("\n\r\n".join(lines) + "\n")
    records = JsonRecords(tmp_path / "data.json")
    assert [records.read_record(number) for number in range(9)] == values


WRONG = {
    "a missing comma": ('[{"a": "é"}\n,{"b": 1} {"c": 1}]', "line 2, column 11: expecting ','"),
    "a missing end": ('[{"a": 1},\n{"b": 2}', "line 2, column 9: expecting ','"),
    "a text cut off": ('{"a": 1}\n{"é": "\\u00', r"line 2, column [79]: (unterminated|invalid)"),
    "a word": ('[{"a": 1},\n  nul]', "line 2, column 3: expecting value"),
    "a tail": ("[{}]\n\n x", "line 3, column 2: extra data"),
    "a line end in a text": ('[{"a": "b\nc"}]', "line 1, column 10: invalid control"),
    "a zero": ('[{"a": "\0"}]', "its byte 9 is 0"),
    "one mapping that is no record": ('{"info": {}, "images": [{}, {}]}', "'images' holds a list"),
    "a number": ("7", "line 1 holds a number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_json_is_told_with_line_and_column(tmp_path, chunk_bytes, name):
    text, words = WRONG[name]
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(UserError, match=words):
        scan_json(tmp_path / "data.json")


def test_bytes_that_are_not_utf8_are_told_with_line_and_byte(tmp_path, chunk_bytes):
    (tmp_path / "data.json").write_bytes('[{"a": "é"},\n{"a": "x'.encode() + b'\xe9"}]')
    with pytest.raises(UserError, match="line 2, byte 9: not UTF-8"):
        scan_json(tmp_path / "data.json")


def test_a_record_without_end_is_refused_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(json_scan, "CHUNK_BYTES", 1 << 10)
    monkeypatch.setattr(json_scan, "MAX_RECORD_BYTES", 1 << 12)
    (tmp_path / "data.json").write_text('[{"a": 1},\n{"a": "' + "b" * (1 << 16))
    with pytest.raises(UserError, match="line 2 begins a record of more than"):
        scan_json(tmp_path / "data.json")


@pytest.fixture
def indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is large enough to get an index beside it."""
    monkeypatch.setattr(record_offsets, "MIN_INDEXED_BYTES", 1)
    file = tmp_path / "data.json"
    file.write_text(json.dumps([record(number) for number in range(50)]))
    return file


def test_an_index_is_made_once_and_shared(indexed, monkeypatch):
    first = ConversationFiles(indexed)
    assert Path(f"{indexed}.index").is_file()
    monkeypatch.setattr("vlbench.data.json_records.scan_json", None)  # nothing to search with
    second = ConversationFiles(indexed)
    assert [second[n].id for n in range(50)] == [first[n].id for n in range(50)]
    assert isinstance(second.records.offsets.offsets, np.memmap)
    sent = pickle.dumps(second)
    assert len(sent) < 2000 and pickle.loads(sent)[49].id == "49"


DAMAGE = {
    "cut off": lambda data: data[:-8],
    "empty": lambda data: b"",
    "another version": lambda data: data.replace(b'"version": 1', b'"version": 9'),
    "no JSON": lambda data: b"x" + data[1:],
    "numbers of another file": lambda data: data[:-8] + b"\xff" * 7 + b"\x7f",
    "too many records": lambda data: data.replace(b'"records": 50', b'"records": 51'),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_index_is_made_anew(indexed, name):
    index = Path(f"{indexed}.index")
    ConversationFiles(indexed)
    whole = index.read_bytes()
    index.write_bytes(DAMAGE[name](whole))
    assert ConversationFiles(indexed)[49].id == "49"
    assert index.read_bytes() == whole


def test_a_file_that_changes_is_searched_again_and_bad_where_it_is_open(indexed):
    opened = ConversationFiles(indexed)
    indexed.write_text(json.dumps([record(number) for number in range(60, 63)]))
    os.utime(indexed, (1, 1))
    with pytest.raises(BadSample, match="is another file than it was when it was opened"):
        opened[0]
    assert [ConversationFiles(indexed)[n].id for n in range(3)] == ["60", "61", "62"]


def test_where_no_index_can_be_written_the_file_is_read_all_the_same(indexed, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(record_offsets, "_write_index", refuse)
    assert pickle.loads(pickle.dumps(ConversationFiles(indexed)))[49].id == "49"
    assert not Path(f"{indexed}.index").exists()


def test_an_index_that_leads_elsewhere_is_a_bad_sample(indexed):
    source = ConversationFiles(indexed)
    offsets = np.array(source.records.offsets.offsets)
    offsets[7] += 2
    index = Path(f"{indexed}.index")
    index.write_bytes(index.read_bytes()[: kept_numbers.HEADER_BYTES] + offsets.tobytes())
    with pytest.raises(BadSample, match=r"record 8.*no record begins .* remove .*\.index"):
        ConversationFiles(indexed)[7]


def test_rows_of_a_table_may_go_over_several_lines(tmp_path):
    text = 'image,caption\r\na.jpg,"one\r\n\r\ntwo ""2"""\r\n\r\nb.jpg,three\r\n'
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    records = TableRecords(tmp_path / "t.csv")
    assert [records.read_record(n)["caption"] for n in range(len(records))] == [
        'one\r\n\r\ntwo "2"',
        "three",
    ]


def test_a_cell_may_be_long(tmp_path):
    (tmp_path / "t.tsv").write_text(f"image\tcaption\na.jpg\t{'x' * 300_000}\n")
    assert len(TableRecords(tmp_path / "t.tsv").read_record(0)["caption"]) == 300_000
