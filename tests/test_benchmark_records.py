"""MMMU's and CMMMU's data: every layout gives the same records, and bad data are named."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlbench.errors import UserError
from vlbench.evaluate.tasks.benchmark_files import find_split
from vlbench.evaluate.tasks.benchmark_records import (
    parse_answer,
    parse_image,
    parse_options,
    read_cmmmu_records,
    read_mmmu_records,
)
from vlbench.evaluate.tasks.benchmark_types import BenchmarkRecord, RecordImage

GOLDEN = Path(__file__).parent / "goldens/evaluation"
VALIDATION = GOLDEN / "mmmu_tiny_lmms/data/validation-00000-of-00001.parquet"
GITHUB = "cmmmu-data-val/science"


def mmmu(layout: str | Path = "mmmu_tiny", split: str = "validation", **more: object) -> list:
    return read_mmmu_records(str(GOLDEN / layout), split, **more)


def cmmmu(layout: str | Path = "cmmmu_tiny", split: str = "val", **more: object) -> list:
    return read_cmmmu_records(str(GOLDEN / layout), split, **more)


def copied(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / name, folder / name, copy_function=shutil.copyfile))


def rewritten(folder: Path, *, file: str = VALIDATION.name, **changes: list) -> Path:
    """Write the questions of MMMU with other columns: a list of cells, or None for no column."""
    table = pq.read_table(VALIDATION)
    for name, cells in changes.items():
        table = table.drop_columns(name)
        if cells is not None:
            table = table.append_column(name, [cells])
    pq.write_table(table, folder / file)
    return folder


def ids(records: list[BenchmarkRecord]) -> list[str]:
    return [record.id for record in records]


@pytest.mark.parametrize("split", ["dev", "validation", "val", "test"])
def test_both_layouts_of_mmmu_give_the_same_records(split):
    one, other = mmmu("mmmu_tiny", split), mmmu("mmmu_tiny_lmms", split)
    assert one == other
    assert [list(record.images) for record in one] == [list(r.images) for r in other]


@pytest.mark.parametrize("split", ["dev", "val", "validation", "test"])
def test_the_three_layouts_of_cmmmu_give_the_same_records(split):
    one = cmmmu("cmmmu_tiny", split)
    assert one == cmmmu("cmmmu_tiny_lmms", split) == cmmmu("cmmmu_tiny_github", split)
    inner = GOLDEN / f"cmmmu_tiny_github/cmmmu-data-{split.replace('idation', '')}"
    assert one == cmmmu(inner, split)


def test_a_record_of_mmmu():
    record = next(record for record in mmmu() if record.id == "validation_Accounting_3")
    assert (record.task, record.subject, record.type) == ("mmmu", "Accounting", "multiple-choice")
    assert record.question.endswith("What are the equivalent units?<image 1>")
    assert record.options == ("It's 42,000", 'He said "no"', "C:\\temp\\new", "a\nb")
    assert record.answer == "C" and list(record.images) == ["image_1"]
    image = record.images["image_1"]
    assert image.name == "record validation_Accounting_3: image validation_Accounting_3_1.png"
    assert image.open().mode == "RGB" and "bytes" not in repr(image)
    answers = {record.id: record.answer for record in mmmu()}
    assert answers["validation_Math_2"] == ("24/7", "3.429")
    assert {record.answer for record in mmmu(split="test")} == {None}
    assert next(r for r in mmmu() if r.id == "validation_Math_10").images == {}


def test_a_record_of_cmmmu():
    records = {record.id: record for record in cmmmu()}
    record = records["1105"]
    assert (record.subject, record.category, record.type) == ("艺术", "艺术与设计", "选择")
    assert record.options[0] == '<img="a_01105_001.png">' and record.answer == "D"
    # the hub's columns begin with the question's image, GitHub's list ends with it
    assert next(iter(record.images)) == "q_01105_001.png"
    listed = {record.id: record for record in cmmmu("cmmmu_tiny_github")}["1105"]
    assert next(iter(listed.images)) == "a_01105_001.png"
    assert record.images["q_01105_001.png"] == listed.images["q_01105_001.png"]
    assert records["1110"].options == () and records["1102"].answer == "AC"
    assert {record.answer for record in cmmmu(split="test")} == {None}


def test_subjects_come_in_the_order_of_the_benchmark_whatever_the_order_of_the_file(tmp_path):
    table = pq.read_table(VALIDATION)
    backwards = table.take(list(range(table.num_rows))[::-1])
    pq.write_table(backwards, tmp_path / VALIDATION.name)
    subjects = [record.subject for record in mmmu(tmp_path)]
    assert subjects == sorted(subjects)
    assert ids(mmmu(tmp_path))[0] == "validation_Accounting_12"  # within one, that of the file


def test_several_files_are_one_split(tmp_path):
    table = pq.read_table(VALIDATION)
    for number in range(3):
        part = table.slice(number * 13, 13)
        pq.write_table(part, tmp_path / f"validation-{number:05d}-of-00003.parquet")
    assert mmmu(tmp_path) == mmmu()
    (tmp_path / "validation-00001-of-00003.parquet").unlink()
    with pytest.raises(UserError, match="of 3 files 1 are missing: 00001-of-00003"):
        mmmu(tmp_path)


def test_one_file_is_enough():
    assert mmmu(VALIDATION) == mmmu()
    assert ids(cmmmu(GOLDEN / "cmmmu_tiny_github" / GITHUB / "science.jsonl"))[0] == "7101"


@pytest.mark.parametrize("layout", ["mmmu_tiny", "mmmu_tiny_lmms"])
def test_some_subjects_of_mmmu(layout):
    some = mmmu(layout, subjects=["Math", "Art"])
    assert some == [record for record in mmmu() if record.subject in ("Art", "Math")]


@pytest.mark.parametrize("layout", ["cmmmu_tiny", "cmmmu_tiny_lmms", "cmmmu_tiny_github"])
@pytest.mark.parametrize("name", ["business", "商业"])
def test_some_categories_of_cmmmu(layout, name):
    assert cmmmu(layout, subjects=[name]) == [r for r in cmmmu() if r.category == "商业"]


def test_files_of_other_subjects_are_not_read(tmp_path):
    data = copied("mmmu_tiny", tmp_path)
    (data / "Art" / VALIDATION.name).write_bytes(b"torn")
    assert {record.subject for record in mmmu(data, subjects=["Math"])} == {"Math"}
    with pytest.raises(UserError, match="Art/validation-00000-of-00001.parquet: is torn, or no"):
        mmmu(data)


@pytest.mark.parametrize(
    ("cell", "answer"),
    [
        (None, None),
        ("", None),
        ("?", None),
        ("B", "B"),
        (12, "12"),
        ("['24/7', '3.429']", ("24/7", "3.429")),
        (["a", "b"], ("a", "b")),
        ("[0, 1]", "[0, 1]"),  # an interval
        ("[unclosed", "[unclosed"),
        ("[]", "[]"),
    ],
)
def test_answers(cell, answer):
    assert parse_answer(cell) == answer


def test_options_may_be_a_list_or_its_text():
    assert parse_options("[1, 'b', \"it's\"]", "x") == parse_options([1, "b", "it's"], "x")
    assert parse_options("['\\frac{1}{2}']", "x") == ("\frac{1}{2}",)  # as Python reads the escape


def test_cells_of_images():
    assert parse_image(None, "r", ()) is None
    assert parse_image({"bytes": None, "path": None}, "r", (None,)) is None
    assert parse_image(b"x", "r", ("a.png",)) == RecordImage("r", "a.png", b"x")
    assert parse_image({"bytes": b"x", "path": "f/b.png"}, "r", ()) == RecordImage(
        "r", "b.png", b"x"
    )
    assert parse_image({"bytes": b"x", "path": "b.png"}, "r", ("a.png",)).file_name == "a.png"
    assert parse_image({"bytes": None, "path": "b.png"}, "r", ()) == RecordImage("r", "b.png", b"")
    with pytest.raises(UserError, match="record r: image b.png: is named, and its file is missing"):
        RecordImage("r", "b.png", b"").open()


def test_the_revision_is_that_of_the_hub_or_of_the_contents(tmp_path):
    assert re.fullmatch(
        "sha256 [0-9a-f]{16}", find_split(str(GOLDEN / "mmmu_tiny"), "val").data_revision()
    )
    data = copied("mmmu_tiny", tmp_path)
    before = find_split(str(data), "val").data_revision()
    assert before == find_split(str(GOLDEN / "mmmu_tiny"), "val").data_revision()
    rewritten(data / "Math", answer=["A"] * 37)
    assert find_split(str(data), "val").data_revision() != before
    snapshot = tmp_path / "hub/datasets--MMMU--MMMU/snapshots/a1b2c3"
    shutil.copytree(GOLDEN / "mmmu_tiny", snapshot)
    assert find_split(str(snapshot), "dev").data_revision() == "hub a1b2c3"


def test_a_hub_id_is_fetched_by_the_files_of_its_split(monkeypatch):
    asked = {}

    def download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(GOLDEN / "mmmu_tiny")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert read_mmmu_records("MMMU/MMMU", "val") == mmmu()
    patterns = ["*val-*.parquet", "*validation-*.parquet"]
    assert asked == {"name": "MMMU/MMMU", "repo_type": "dataset", "allow_patterns": patterns}


def pointer(folder: Path) -> Path:
    (folder / VALIDATION.name).write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    return folder


def torn(folder: Path) -> Path:
    whole = VALIDATION.read_bytes()
    (folder / VALIDATION.name).write_bytes(whole[: len(whole) // 2])
    return folder


def torn_inside(folder: Path) -> Path:
    """Damage the pages of a parquet file and leave its index."""
    whole = bytearray(VALIDATION.read_bytes())
    whole[200:4000] = bytes(3800)
    (folder / VALIDATION.name).write_bytes(whole)
    return folder


def empty(folder: Path) -> Path:
    pq.write_table(pq.read_table(VALIDATION).slice(0, 0), folder / VALIDATION.name)
    return folder


def twice(folder: Path) -> Path:
    shutil.copyfile(VALIDATION, folder / "validation-00000-of-00001.parquet")
    shutil.copyfile(VALIDATION, folder / "val.parquet")
    return folder


def numbers(folder: Path) -> Path:
    return rewritten(folder, options=["12"] * 37)


MISTAKES: dict[str, tuple[Callable[[Path], Path | str], str]] = {
    "no folder": (lambda f: f / "none", "data is '.*none', which is no folder or file and no hub"),
    "nothing in it": (lambda f: f, "where no split of a benchmark is; wanted is SPLIT-"),
    "a pointer": (pointer, "validation-00000-of-00001.parquet: is a Git-LFS pointer"),
    "torn": (torn, "validation-00000-of-00001.parquet: is torn, or no parquet file"),
    "torn inside": (torn_inside, "validation-00000-of-00001.parquet: is torn, or no parquet"),
    "no rows": (empty, "split 'validation': has no records"),
    "twice": (twice, "split 'validation': record validation_Accounting_1 is there 2 times"),
    "columns": (
        lambda f: rewritten(f, options=None, question=None),
        "lacks the columns question, options; it has id, image_1",
    ),
    "options": (numbers, "record validation_Accounting_1: its options are '12'; wanted is a list"),
}


@pytest.mark.parametrize(("make", "words"), MISTAKES.values(), ids=MISTAKES)
def test_bad_data_are_named_in_one_line(make, words, tmp_path):
    with pytest.raises(UserError) as mistake:
        read_mmmu_records(str(make(tmp_path)), "validation")
    assert re.search(words, str(mistake.value)) and "\n" not in str(mistake.value)


def test_what_is_not_there_is_named_beside_what_is():
    with pytest.raises(
        UserError, match="no split 'tst' in .*; it has dev, test, validation. Did .* 't"
    ):
        mmmu(split="tst")
    with pytest.raises(
        UserError, match="no subject of MMMU 'Acounting'. Did you mean 'Accounting'?"
    ):
        mmmu(subjects=["Acounting"])
    with pytest.raises(
        UserError, match="no category of CMMMU 'buisness'. Did you mean 'business'?"
    ):
        cmmmu(subjects=["buisness"])
    with pytest.raises(UserError, match="split 'validation': has no records of Biology"):
        mmmu(subjects=["Math", "Biology"])


def test_without_a_network_a_hub_id_gives_one_line(monkeypatch):
    def download(name: str, **options: object) -> str:
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(UserError) as mistake:
        read_mmmu_records("MMMU/MMMU", "dev")
    line = str(mistake.value)
    assert "the hub cannot give it (" in line and "no network" in line and "*dev-*.parquet" in line
    assert "\n" not in line


def test_lines_that_are_not_json(tmp_path):
    data = copied("cmmmu_tiny_github", tmp_path)
    file = data / GITHUB / "science.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join([lines[0], lines[1][:40]]), encoding="utf-8")
    with pytest.raises(UserError, match="science.jsonl: line 2 is not JSON"):
        cmmmu(data)
    file.write_text(json.dumps({"id": 1, "type": "选择"}), encoding="utf-8")
    with pytest.raises(UserError, match="lacks the columns question, category, subcategory"):
        cmmmu(data)


def test_a_broken_or_missing_image_is_named_when_it_is_opened(tmp_path):
    data = copied("cmmmu_tiny_github", tmp_path)
    (data / GITHUB / "q_07101_001.png").write_bytes(b"no picture")
    (data / GITHUB / "q_07110_001.png").unlink()
    records = {record.id: record for record in cmmmu(data)}
    with pytest.raises(UserError, match="^record 7101: image q_07101_001.png: not an image"):
        records["7101"].images["q_07101_001.png"].open()
    with pytest.raises(UserError, match="^record 7110: image q_07110_001.png: is named, and"):
        records["7110"].images["q_07110_001.png"].open()


def test_a_torn_image_in_a_parquet_file_is_named(tmp_path):
    table = pq.read_table(VALIDATION)
    cells = table["image_1"].to_pylist()
    cells[0] = {"bytes": cells[0]["bytes"][:500], "path": "validation_Accounting_1_1.png"}
    data = rewritten(tmp_path, image_1=pa.array(cells, table["image_1"].type))
    image = mmmu(data)[0].images["image_1"]
    words = "record validation_Accounting_1: image validation_Accounting_1_1.png: cannot be read"
    with pytest.raises(UserError, match=words):
        image.open()


def test_reading_and_asking_import_no_torch():
    code = (
        "import sys\n"
        "from vlbench.evaluate.tasks import benchmark_prompts, benchmark_records\n"
        "assert not {'torch', 'transformers', 'pyarrow', 'huggingface_hub'} & set(sys.modules)\n"
        f"record = benchmark_records.read_mmmu_records({str(GOLDEN / 'mmmu_tiny')!r}, 'dev')[0]\n"
        "assert benchmark_prompts.prompt_or_skip(record, 'yi').text\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
