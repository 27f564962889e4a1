"""LLaVA's JSON as people write it is read; every error names file, record and position."""

from __future__ import annotations

import json
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlbench.data.conversation_files import ConversationFiles
from vlbench.data.preflight import MAX_INSPECTED_SAMPLES, has_images, inspect_source
from vlbench.data.sample import IMAGE_PLACEHOLDER, ChatTurn, Sample
from vlbench.errors import BadSample, UserError

ASK = {"from": "human", "value": "<image>\nWhat?"}
ANSWER = {"from": "gpt", "value": "A circle."}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def source(folder: Path, *records: Any) -> ConversationFiles:
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    return ConversationFiles(folder / "data.json")


def record(*turns: Any, **keys: Any) -> dict[str, Any]:
    return {"id": "r1", "image": "a.png", "conversations": list(turns or (ASK, ANSWER)), **keys}


def test_both_spellings_of_roles_and_tags(folder):
    second = [
        {"from": "user", "value": "<image_placeholder>这是什么？"},
        {"from": "assistant", "value": "<image> is a tag of HTML."},
    ]
    data = source(folder, record(), record(*second, id=7))
    one, two = data[0], data[1]
    assert len(data) == 2 and data.name == str(folder / "data.json")
    assert one.id == "r1" and one.images[0].name == str(folder / "a.png")
    assert one.turns == (
        ChatTurn("human", f"{IMAGE_PLACEHOLDER}\nWhat?"),
        ChatTurn("assistant", "A circle."),
    )
    assert two.turns[0].text == f"{IMAGE_PLACEHOLDER}这是什么？" and two.id == "7"
    assert two.turns[1].text == "<image> is a tag of HTML."  # an answer shows no image
    assert (one.language, two.language) == ("en", "zh")


def test_none_one_and_several_images(folder):
    plain = {"from": "human", "value": "Hello"}
    many = {"from": "human", "value": "<image><image> Same?"}
    data = source(
        folder,
        {"conversations": [plain, ANSWER]},
        record(plain, ANSWER, image=None),
        record(plain, ANSWER),
        record(many, ANSWER, image=["a.png", "b.png"]),
        record({"from": "system", "value": "Be brief."}, plain, ANSWER),
    )
    assert data[0].id == "record 1" and not data[0].images and not data[1].images
    assert (
        data[2].turns[0].text == f"{IMAGE_PLACEHOLDER}\nHello"
    )  # one image, no tag: it comes first
    assert [Path(picture.name).name for picture in data[3].images] == ["a.png", "b.png"]
    assert data[4].turns[0].role == "system" and data[4].turns[1].text.startswith(IMAGE_PLACEHOLDER)
    assert data.find_bad_samples() == [] and inspect_source(data).bad_samples == []


def test_jsonl_and_an_image_folder(folder):
    lines = [json.dumps(record(id=name), ensure_ascii=False) for name in ("一", "二")]
    (folder / "json").mkdir()
    file = folder / "json" / "data.jsonl"
    file.write_text("\ufeff" + "\n\n".join(lines) + "\n", encoding="utf-8")
    data = ConversationFiles(file, folder)
    assert [data[index].id for index in range(2)] == ["一", "二"] and data.find_bad_samples() == []
    assert pickle.loads(pickle.dumps(data))[1] == data[1]


BAD_RECORDS = {
    "not a mapping": ([1, 2], "record 1", "is a list .*expected a mapping"),
    "no conversations": (
        {"id": "x", "conversation": []},
        "x",
        "no 'conversations'; .*'conversation'",
    ),
    "conversations a text": ({"conversations": "hi"}, "record 1", "is a text .*list of turns"),
    "empty conversation": (record() | {"conversations": []}, "r1", "conversation is empty"),
    "turn is a text": (record("hello"), "r1", "turn 1: is a text"),
    "no value": (record({"from": "human"}), "r1", "turn 1: has no 'value'"),
    "value a number": (record({"from": "human", "value": 3}), "r1", "'value' is a number"),
    "value null": (record(ASK, {"from": "gpt", "value": None}), "r1", "turn 2: 'value' is null"),
    "empty text": (record(ASK, {"from": "gpt", "value": " "}), "r1", "turn 2: .*is empty"),
    "unknown role": (record({"from": "humen", "value": "x"}), "r1", "'humen'; .*mean 'human'"),
    "begins with answer": (record(ANSWER, ASK), "r1", "begins with 'assistant'"),
    "two answers": (record(ASK, ANSWER, ANSWER), "r1", "turn 3 is 'assistant'"),
    "no answer": (record(ASK), "r1", "no assistant turn"),
    "more tags": (record(image=None), "r1", "1 image tag in the text but 0 images"),
    "more images": (record(image=["a.png", "b.png"]), "r1", "1 image tag .* but 2 images"),
    "image a number": (record(image=5), "r1", "'image' is a number"),
    "image empty": (record(image=""), "r1", "1 image tag in the text but 0 images"),
    "a turn behind a system prompt": (
        record(
            conversations=[
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "<image>"},
                {"from": "human", "value": "Colour?"},
            ]
        ),
        "r1",
        "turn 3 is 'human' where 'assistant' is expected",
    ),
    "missing image": (record(image="gone.png"), "r1", r"gone\.png: does not exist"),
}


@pytest.mark.parametrize(("bad", "name", "words"), BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_bad_records_are_found_and_named(folder, bad, name, words):
    data = source(folder, bad, record(id="sound"))
    (fault,) = data.find_bad_samples()
    (same,) = inspect_source(data).bad_samples
    with pytest.raises(BadSample, match=words) as caught:
        raise fault
    assert fault.sample_id == same.sample_id == name and fault.reason == same.reason
    assert "\n" not in str(caught.value) and name in str(caught.value)
    assert data[1].id == "sound"


def test_preflight_opens_images_only_while_they_are_few(folder):
    (folder / "b.png").write_bytes(b"")
    data = source(folder, record(), record(image="b.png", id="r2"), record(image="b.png", id="r3"))
    assert [fault.sample_id for fault in inspect_source(data).bad_samples] == ["r2", "r3"]
    assert "is empty (0 bytes)" in str(inspect_source(data).bad_samples[0])
    assert inspect_source(data, max_opened_images=1).bad_samples == []


class ManyRecords:
    """So many records without an image, one in 50 of them bad; it notes which are read."""

    name = "many"
    find_bad_samples = ConversationFiles.find_bad_samples

    def __init__(self, count: int) -> None:
        self.count, self.read = count, []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        self.read.append(index)
        if index % 50 == 7:
            raise BadSample(f"record {index + 1}", "is bad")
        return Sample(str(index), (ChatTurn("human", "What?"), ChatTurn("assistant", "This.")))


def test_preflight_of_many_records_reads_some_of_them_once_and_all_over():
    data = ManyRecords(10**8)
    report = inspect_source(data)
    assert (
        len(data.read) == report.inspected_samples == MAX_INSPECTED_SAMPLES == len(set(data.read))
    )
    assert report.bad_sample_count == len(data.read) // 50 and not report.is_complete
    assert report.inspected_words == "20000 inspected of 100000000 samples"
    largest_gap = max(after - one for one, after in pairwise([*data.read, len(data)]))
    assert data.read[0] == 0 and largest_gap <= len(data) // 200
    again = ManyRecords(10**8)
    inspect_source(again)
    assert again.read == data.read  # so that what a run records is the same
    assert not has_images(again, report.bad_samples) and len(again.read) < 2 * MAX_INSPECTED_SAMPLES


@pytest.mark.parametrize("count", [199, 200, 201, 299, 301])
def test_preflight_reads_no_record_twice_and_all_where_they_are_few(count):
    data = ManyRecords(count)
    report = inspect_source(data, max_inspected_samples=200)
    assert len(set(data.read)) == len(data.read) == min(count, 200) and max(data.read) < count
    assert report.is_complete == (count <= 200)


def test_preflight_leaves_rendered_sources_alone():
    class Rendered:
        name = "rendered"

        def __len__(self) -> int:
            return 10**9

        def __getitem__(self, index: int) -> Sample:
            raise AssertionError

    assert inspect_source(Rendered()).bad_samples == []


BAD_FILES = {
    "empty.json": (b" \n", "the file is empty"),
    "no records.json": (b"[]", "no records"),
    "a mapping.json": (b'{"data": []}', "line 1 holds a mapping .*expected a list of records"),
    "a comma.json": (b'[\n {"id": 1},\n]', "line [23], column 1"),
    "cut off.json": (b'[{"id": "a', "line 1, column 9: unterminated string"),
    "a tail.json": (b'[{"id": 1}]\n{"id": 2}\n', "line 2, column 1: extra data"),
    "bad.jsonl": (b'{"id": 1}\n{"id" 2}\n', "line 2, column 7: expecting ':'"),
    "latin.json": (b'[{"id":\n "caf\xe9"}]', "line 2, byte 6: not UTF-8"),
    "deep.json": (b"[" * 200_000, "nested too deeply|line 1"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named_with_line_and_column(tmp_path, name):
    content, words = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        ConversationFiles(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files_and_folders(folder):
    source(folder, record())
    with pytest.raises(UserError, match=r"no such file.*Did you mean 'data\.json'"):
        ConversationFiles(folder / "dada.json")
    with pytest.raises(UserError, match="is a folder"):
        ConversationFiles(folder)
    with pytest.raises(UserError, match="no folder .*pictures"):
        ConversationFiles(folder / "data.json", folder / "pictures")
