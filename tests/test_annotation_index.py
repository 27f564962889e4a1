"""Samples of annotation files are found once, by their bytes, and read one by one."""

from __future__ import annotations

import json
import os
import pickle
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from annotation_layouts import write_layout

from vlbench.__main__ import main
from vlbench.config.recipe import load_recipe
from vlbench.data import annotation_index, json_scan, kept_numbers
from vlbench.data.conversation_files import ConversationFiles
from vlbench.data.data_checksums import checksum_sources
from vlbench.data.data_sources import open_held_out, open_stage_sources
from vlbench.data.json_nesting import scan_nested
from vlbench.data.mapped_sources import find_mapped_source
from vlbench.data.shuffle import SourceMixture
from vlbench.errors import BadSample, UserError

ROOT = Path(__file__).parents[1]
ODD = {
    "info": {"a": [{"b": "]}"}, 'é"{'], "\\": {}},
    "pictures": [{"id": n, "名": "猫" * n} for n in range(9)],
    "empty": [],
    "deeper": {"x": [1, "}"], "records": {f"k{n}\u2028": {"n": n, "t": '"é\\'} for n in range(9)}},
    "tail": None,
}


@pytest.fixture(params=[1, 7, 1 << 24])
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records are cut by chunks at every place."""
    monkeypatch.setattr(json_scan, "CHUNK_BYTES", request.param)


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, 1])
def test_records_below_a_path_are_found(tmp_path, chunk_bytes, indent, ascii_only) -> None:
    text = json.dumps(ODD, indent=indent, ensure_ascii=ascii_only)
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    data = (tmp_path / "a.json").read_bytes()
    pictures = list(scan_nested(tmp_path / "a.json", "pictures"))
    assert [found.value for found in pictures] == ODD["pictures"]
    assert [json.loads(data[one.start : one.end]) for one in pictures] == ODD["pictures"]
    keyed = list(scan_nested(tmp_path / "a.json", "deeper.records.*"))
    assert {one.key: one.value for one in keyed} == ODD["deeper"]["records"]
    assert json.loads(b"{" + data[keyed[3].start : keyed[3].end] + b"}") == {
        keyed[3].key: keyed[3].value
    }
    assert list(scan_nested(tmp_path / "a.json", "empty")) == []


CUT = {
    '{"a": [{"b": 1}, {"c"': "line 1, column 2[12]: ",
    '{"a": [{"b": 1} {"c": 2}]}': "column 17: expecting ',' delimiter",
    '{"b" 1, "a": []}': "column 6: expecting ':' delimiter",
    '{"b": 1, 7: []}': "column 10: expecting property name",
    '{"b": 1': "column 8: expecting ','",
    '{"a": [1], "a": 2}': "",
}


@pytest.mark.parametrize("text", CUT)
def test_what_is_no_json_is_told_with_its_column(text, tmp_path, chunk_bytes) -> None:
    (tmp_path / "a.json").write_text(text)
    if not CUT[text]:  # what stands behind the records is not read
        assert [one.value for one in scan_nested(tmp_path / "a.json", "a")] == [1]
        return
    with pytest.raises(UserError, match=CUT[text]):
        list(scan_nested(tmp_path / "a.json", "a"))


@pytest.fixture
def indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set whose files are large enough to get an index."""
    monkeypatch.setattr(annotation_index, "MIN_INDEXED_BYTES", 1)
    write_layout("vqav2", tmp_path)
    return tmp_path


def test_an_index_is_made_once_and_shared(indexed, monkeypatch) -> None:
    first = ConversationFiles(f"vqav2:{indexed}")
    (index,) = indexed.glob("v2_mscoco_train2014_annotations.json.*.index")
    monkeypatch.setattr(annotation_index, "_search_rows", None)  # nothing to search with
    second = ConversationFiles(f"vqav2:{indexed}")
    assert isinstance(second.records.rows.numbers, np.memmap)
    assert [second[n] for n in range(2)] == [first[n] for n in range(2)]
    sent = pickle.loads(pickle.dumps(second))
    assert isinstance(sent.records.rows.numbers, np.memmap) and sent[1] == first[1]
    monkeypatch.undo()
    monkeypatch.setattr(annotation_index, "MIN_INDEXED_BYTES", 1)
    known, whole = first[1], index.read_bytes()
    index.unlink()  # others have mapped it
    index.write_bytes(whole[:-8])
    assert ConversationFiles(f"vqav2:{indexed}")[1] == known and index.read_bytes() == whole


def test_an_index_that_leads_elsewhere_is_a_bad_sample(indexed) -> None:
    ConversationFiles(f"vqav2:{indexed}")
    (index,) = indexed.glob("*.index")
    whole = index.read_bytes()
    numbers = np.frombuffer(whole[kept_numbers.HEADER_BYTES :], np.int64).reshape(2, 5)
    for row, column, moved in ((0, 0, 2), (0, 0, 1 << 40), (1, 3, 5), (1, 4, -1 << 40)):
        damaged = numbers.copy()
        damaged[row, column] += moved
        index.unlink()
        index.write_bytes(whole[: kept_numbers.HEADER_BYTES] + damaged.tobytes())
        with pytest.raises(BadSample, match=rf"record {row + 1}.*; remove the files \*.index"):
            ConversationFiles(f"vqav2:{indexed}")[row]


def test_mappings_of_one_file_have_an_index_each(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(annotation_index, "MIN_INDEXED_BYTES", 1)
    write_layout("ocr_vqa", tmp_path)
    (tmp_path / "images/1.jpg").write_bytes((tmp_path / "images/761183272.jpg").read_bytes())
    train, val = (ConversationFiles(f"ocr_vqa:{tmp_path}:{split}") for split in ("train", "val"))
    assert [len(train), len(val)] == [2, 1] and len(list(tmp_path.glob("*.index"))) == 2
    assert [one[0].id for one in pickle.loads(pickle.dumps([train, val]))] == ["761183272", "1"]


def test_a_file_that_changes_is_searched_again_and_bad_where_it_is_open(indexed) -> None:
    opened = ConversationFiles(f"vqav2:{indexed}")
    file = indexed / "v2_OpenEnded_mscoco_train2014_questions.json"
    file.write_text(file.read_text().replace("the café", "a bar"))
    os.utime(file, (1, 1))
    with pytest.raises(BadSample, match="record 2: .*questions.json: is another file than it was"):
        opened[1]
    assert "Is a bar open?" in ConversationFiles(f"vqav2:{indexed}")[1].turns[0].text


def test_where_no_index_can_be_written_the_files_are_read_all_the_same(indexed, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(annotation_index, "write_numbers", refuse)
    assert pickle.loads(pickle.dumps(ConversationFiles(f"vqav2:{indexed}")))[0].id == "458752000"
    assert list(indexed.glob("*.index")) == []


def test_shards_of_a_mapping_have_the_bytes_of_those_of_llava(tmp_path) -> None:
    (tmp_path / "llava.json").write_text(json.dumps(write_layout("vqav2", tmp_path / "vqa")))
    for data, out in ((f"vqav2:{tmp_path / 'vqa'}", "a"), (str(tmp_path / "llava.json"), "b")):
        words = [f"data={data}", f"images={tmp_path / 'vqa'}", f"out={tmp_path / out}"]
        assert main(["pack", *words, "samples=1"]) == 0
    for file in ("000000.tar", "000001.tar", "shards.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def open_stage(*words: str) -> Any:
    return load_recipe(["recipe=yivl_llava", *words]).last_stage_data


def test_a_stage_takes_mappings_wherever_it_takes_data(tmp_path) -> None:
    """And in the order of LLaVA's JSON."""
    (tmp_path / "llava.json").write_text(json.dumps(write_layout("vg_qa", tmp_path)))
    write_layout("ocr_vqa", tmp_path)
    held = open_held_out(open_stage(f"data.train=vg_qa:{tmp_path}", f"data.val=ocr_vqa:{tmp_path}"))
    assert held is not None and held[0].id == "761183272"
    streams = [
        SourceMixture(open_stage_sources(open_stage(f"data.train={data}")), 7)
        for data in (f"vg_qa:{tmp_path}", str(tmp_path / "llava.json"))
    ]
    ids = [[stream[n].id for n in range(9)] for stream in streams]
    assert ids[0] == ids[1] and set(ids[0]) == {"1", "2"}
    mix = f"[{{train: vg_qa:{tmp_path}, weight: 2}}, {{train: ocr_vqa:{tmp_path}:train}}]"
    assert [weight for _, weight in open_stage_sources(open_stage(f"data.mix={mix}"))] == [2, 1]


def test_pictures_are_looked_up_in_the_folder_of_images(tmp_path) -> None:
    write_layout("vqav2", tmp_path / "coco")
    (tmp_path / "vqa").mkdir()
    for file in (tmp_path / "coco").glob("*.json"):
        file.rename(tmp_path / "vqa" / file.name)
    source = ConversationFiles(f"vqav2:{tmp_path / 'vqa'}", tmp_path / "coco")
    assert source.find_bad_samples() == []


OWN = 'records: books.json\nimage: "{picture}"\nquestion: "{q}"\nanswer: "{a}"\n'


def test_a_mapping_of_ones_own_is_found_by_its_name_or_its_file(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("recipes/data/books.yaml", "elsewhere/other.yml", "recipes/data/vqav2.yaml"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(OWN)
    Path("recipes/data/mixture.yaml").write_text("sources: [a]\n")
    Path("set").mkdir()
    Path("set/books.json").write_text('[{"picture": "a.jpg", "q": "Who?", "a": "Ann"}]')
    for name in ("books", "elsewhere/other.yml", "vqav2"):  # one's own comes first
        source = ConversationFiles(f"{name}:set")
        assert source[0].turns[1].text == "Ann" and source.name == f"{name}:set"
    with pytest.raises(UserError, match="no mapping of annotation files 'mixture'"):
        ConversationFiles("mixture:set")


def test_list_shows_what_a_mapping_needs(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipes/data").mkdir(parents=True)
    Path("recipes/data/broken.yaml").write_text("records: a\n")
    Path("recipes/data/books.yaml").write_text("# Books of mine\n" + OWN)
    assert main(["list", "data"]) == 0
    said = capsys.readouterr().out
    assert "Books of mine\n" in said and "needs books.json, {picture}\n" in said
    assert "cannot be used: recipes/data/broken.yaml: answer is missing" in said
    assert "needs v2_mscoco_train2014_annotations.json, v2_OpenEnded_mscoco_train2014_q" in said
    assert "; splits train, val\n" in said and "from https://visualqa.org/download.html" in said


def test_other_locations_are_no_mappings(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("gqa", "parquets", "data"):
        Path(folder).mkdir()
    for file in ("odd:name.json", "gqa/a.parquet", "parquets/b.parquet"):
        Path(file).touch()
    for location in (
        "gqa:validation",  # a split of Parquet files in ./gqa
        "parquets:train",
        "odd:name.json",
        "owner/name:validation",
        "s3://bucket/x.tar",
        "c:data",
        "x.json",
        "",
    ):
        assert find_mapped_source(location) is None
    with pytest.raises(UserError, match="no file questions/train_balanced_questions.json in data"):
        ConversationFiles("gqa:data")
    Path("gqa/a.parquet").unlink()
    with pytest.raises(UserError, match="data gqa:nowhere: nowhere is no folder"):
        ConversationFiles("gqa:nowhere")


def test_a_run_records_what_its_annotations_and_their_mapping_were(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("books.json").write_text('[{"picture": "a.jpg", "q": "Who?", "a": "Ann"}]')
    sums = set()
    for mapping, records in ((OWN, "Ann"), (OWN + "instruction: Say it.\n", "Ann"), (OWN, "Bea")):
        Path("own.yaml").write_text(mapping)
        Path("books.json").write_text(f'[{{"picture": "a.jpg", "q": "Who?", "a": "{records}"}}]')
        sums |= set(checksum_sources([ConversationFiles("own.yaml:.")]).values())
    assert len(sums) == 3


def test_the_wheel_has_the_mappings() -> None:
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = package["package-data"]["vlbench.recipes"]
    files = [str(path.relative_to(ROOT / "recipes")) for path in ROOT.glob("recipes/**/*.yaml")]
    assert any(name.startswith("data/") for name in files)
    assert [name for name in files if not any(fnmatch(name, one) for one in patterns)] == []
