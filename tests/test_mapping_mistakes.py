"""What is wrong with a mapping, its folder or a record is one line that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from annotation_layouts import write_layout
from test_source_pass import check

from vlbench.data.conversation_files import ConversationFiles
from vlbench.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sets")
    for name in ("vqav2", "ocr_vqa", "flickr30k_token"):
        write_layout(name, path / name)
    file = path / "vqav2/v2_mscoco_train2014_annotations.json"
    file.write_text(file.read_text().replace('"question_type"', '"two": [], "question_type"'))
    (path / "refcoco").mkdir()
    (path / "refcoco/refs(unc).p").write_bytes(b"\x80\x04.")
    for place in ("a", "b"):
        (path / "twice" / place).mkdir(parents=True)
        (path / "twice" / place / "dataset.json").write_text("{}")
    (path / "packed").mkdir()
    (path / "packed/dataset.json.zip").write_bytes(b"PK\x03\x04")
    return path


PLACES = {
    "vqa2:{}/vqav2": r"no mapping of annotation files 'vqa2'; known: coco_.* Did you mean 'vqav2'",
    "vqav2:{}/vqav2:val": r"no file v2_mscoco_val2014_annotations.json in .*/vqav2, nor in a "
    r"folder directly inside of it; split val of train, val; from https://visualqa.* Did you mean "
    r"'v2_mscoco_train2014_annotations.json'",
    "vqav2:{}/vqav2:trian": "no split 'trian'; its splits are train, val. Did you mean 'train'",
    "vqav2:{}/nowhere": "nowhere is no folder",
    "vqav2": "names a mapping and no folder; write vqav2:FOLDER",
    "vqav2:{}/ocr_vqa/dataset.json": "is a file; expected the folder that holds it",
    "flickr30k_token:{}/flickr30k_token:val": "no split 'val'; it has no splits",
    "refcoco:{}/refcoco": r"no file finetune_refcoco_train.json .*refs\(unc\).p is a pickle, which "
    "is code",
    "ocr_vqa:{}/ocr_vqa:test": r"dataset.json: no record has 'split' '3'; they have '1', '2'",
    "ocr_vqa:{}/twice": "dataset.json is there more than once: .*/a/dataset.json and ",
    "ocr_vqa:{}/packed": "no file dataset.json in .* Did you mean 'dataset.json.zip'",
    "nowhere.yaml:{}": "nowhere.yaml: No such file",
}


def told(location: str) -> str:
    """Return the only line that is said of a location."""
    with pytest.raises(UserError) as caught:
        ConversationFiles(location)
    (line,) = caught.value.lines
    assert line.startswith(f"data {location}: ") and "\n" not in line
    return line


@pytest.mark.parametrize("location", PLACES)
def test_what_is_not_there_is_one_line(location: str, folder: Path) -> None:
    assert_matches(told(location.format(folder)), PLACES[location])


def assert_matches(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        raise UserError(text)


BOOKS = 'records: dataset.json\nat: "*"\n'
VQA = "records: v2_mscoco_train2014_annotations.json\nat: annotations\n"
LINES = "records: results_20130124.token\n"
MAPPINGS = {
    "an unknown key": (BOOKS + "answr: x\nanswer: x\n", "unknown key 'answr'; .* mean 'answer'"),
    "an unknown key below": (
        VQA + "answer: x\njoin: {q: {fil: x, by: a, of: b}}\n",
        "unknown key 'join.q.fil'; keys are: at, lines, file, by, of. Did you mean 'file'",
    ),
    "a missing key": (BOOKS, "answer is missing: text: what is answered"),
    "an unknown form": (BOOKS + 'answer: "{a:majorty}"\n', "Did you mean 'majority'"),
    "code": (BOOKS + 'answer: "{a.__class__[0]}"\n', "expected {KEY} or {KEY.KEY}, no more"),
    "a conversion": (BOOKS + 'answer: "{a!r}"\n', "has '{a!r}'; expected"),
    "a brace": (BOOKS + 'answer: "{a"\n', "unequal braces"),
    "a box that is nowhere": (BOOKS + 'answer: "{box}"\n', "but no box"),
    "a split that is nowhere": (BOOKS + 'answer: x\nimage: "{split}.jpg"\n', "but no splits"),
    "a split of two texts": (
        BOOKS + 'answer: x\nimage: "{split}.jpg"\nsplits: {train: [1, 2]}\n',
        "split 'train' has 2 texts; expected one",
    ),
    "two kinds of lists": (BOOKS + "answer: x\neach: a\nturns: b\n", "takes each or turns"),
    "two kinds of files": (BOOKS + 'answer: x\nlines: "{a}"\n', "takes at .* or lines"),
    "a pattern without names": (LINES + "answer: x\nlines: x\n", "expected {NAME} once or more"),
    "a box of three": (
        BOOKS + "answer: x\nbox: {xywh: [a, b, c], size: [w, h]}\n",
        "box has 3 paths to a box; expected four, or one",
    ),
    "one side": (BOOKS + "answer: x\nbox: {xywh: a, size: [w]}\n", "box.size has only 1 of"),
    "a file elsewhere": ("records: ../a.json\nanswer: x\n", "must be a file below the folder"),
    "no mapping": ("- a\n", "is not a mapping of keys"),
    "no such list": (VQA.replace("tions\n", "tion\n") + "answer: x\n", "mean 'annotations'"),
    "no list": (VQA.replace("annotations\n", "info\n") + "answer: x\n", "'info' holds a mapping"),
    "no mapping of records": (
        BOOKS.replace('"*"', "761183272.questions.*") + "answer: x\n",
        "list",
    ),
    "no JSON": (LINES + "answer: x\n", "is no JSON; `lines` in the mapping says"),
    "no key of where": (
        BOOKS + "answer: x\nwhere: {spilt: 1}\n",
        "dataset.json: record 1 has no 'spilt'; its keys are .* Did you mean 'split'",
    ),
    "no key of a join": (
        VQA + "answer: x\njoin: {q: {at: annotations, by: image, of: image_id}}\n",
        "annotations.json: record 1 has no 'image'; .* Did you mean 'image_id'",
    ),
}


@pytest.mark.parametrize("name", MAPPINGS)
def test_a_mistake_of_a_mapping_is_one_line(name: str, folder: Path, tmp_path: Path) -> None:
    text, words = MAPPINGS[name]
    (tmp_path / "own.yaml").write_text(text)
    chosen = {"d": "ocr_vqa", "r": "flickr30k_token"}.get(text[9:10], "vqav2")
    assert_matches(told(f"{tmp_path / 'own.yaml'}:{folder / chosen}"), words)


def test_two_mistakes_are_two_lines(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text('recrods: x\nanswer: "{"\n')
    with pytest.raises(UserError) as caught:
        ConversationFiles(f"{tmp_path / 'own.yaml'}:{folder}")
    assert len(caught.value.lines) == 3
    assert all(line.startswith("data ") for line in caught.value.lines)


RECORDS = {
    "no such key": (BOOKS + 'answer: "{answer}"\n', "has no 'answer'; .* Did you mean 'answers'"),
    "a list": (BOOKS + 'answer: "{answers}"\n', "'answers' is a list .*; write {answers:majority}"),
    "no number": (VQA + 'answer: "{answer_type:012}"\n', "expected a whole number of at most 12"),
    "no list of texts": (VQA + 'answer: "{image_id:majority}"\n', "expected a list of texts"),
    "no mapping": (VQA + 'answer: "{image_id.x}"\n', "'image_id' is a number .* with 'x'"),
    "nothing joined": (
        VQA + 'join: {q: {at: annotations, by: image_id, of: question_id}}\nanswer: "{q.x}"\n',
        "'question_id' is '458752000', and no 'image_id' of annotations in .* is",
    ),
    "no list of turns": (VQA + "turns: image_id\nanswer: x\n", "'image_id' is a number"),
    "no second list": (
        BOOKS + "turns: [questions, genre]\nanswer: x\n",
        "'genre' is a text .*; expected a list",
    ),
    "lists of two lengths": (
        VQA + "each: [answers, two]\nanswer: x\n",
        "has lists of different lengths: 'answers' 3, 'two' 0",
    ),
    "no such line": (LINES + 'lines: "{a}|{b}"\nanswer: "{b}"\n', "the line is a text .*'{a}|{b}'"),
    "no box": (
        VQA + 'answer: "{box}"\nbox: {xywh: answer_type, size: [image_id, image_id]}\n',
        "answer_type: is a text",
    ),
    "a picture elsewhere": (VQA + "answer: x\nimage: ../../a.jpg\n", "lies outside of the images'"),
    "no picture": (VQA + "answer: x\nimage: train2014/7.jpg\n", "train2014/7.jpg: does not exist"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_that_does_not_fit_is_one_line(name: str, folder: Path, tmp_path: Path) -> None:
    text, words = RECORDS[name]
    (tmp_path / "own.yaml").write_text(text)
    chosen = {"d": "ocr_vqa", "v": "vqav2", "r": "flickr30k_token"}[text[9]]
    source = ConversationFiles(f"{tmp_path / 'own.yaml'}:{folder / chosen}")
    bad = source.find_bad_samples()[0]
    assert str(bad).startswith("sample record 1: ") and "\n" not in str(bad)
    assert_matches(str(bad), words)


def test_check_names_a_missing_picture_and_the_record(tmp_path: Path) -> None:
    write_layout("vqav2", tmp_path)
    (tmp_path / "train2014/COCO_train2014_000000000009.jpg").unlink()
    _, lengths, (found,) = check(f"vqav2:{tmp_path}")
    assert (found["kind"], found["sample"], found["record"]) == ("refused", "9001", 2)
    assert str(found["what"]).endswith("000000000009.jpg: does not exist")
    assert len(lengths.token_counts) == 1
