"""`check`: each planted fault is found, by name, and nothing else; its page shows what is read."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlbench.__main__ import main
from vlbench.check.supervision_audit import choose_samples, split_into_spans
from vlbench.data.image_processing import ImageTransform
from vlbench.data.sample import Sample
from vlbench.data.sample_encoding import IGNORE_INDEX, IMAGE_TOKEN_INDEX, EncodedSample
from vlbench.data.scene_world import make_scene

SAMPLES, IMAGES = 2000, 200
LONG = "round " * 3000  # more tokens than language.max_length

Record = dict[str, Any]


def record(number: int, image: str | None = None) -> Record:
    """Return a fine record; its texts are its own."""
    return {
        "id": f"fine-{number}",
        "image": image or f"{number % IMAGES}.png",
        "conversations": [
            {"from": "human", "value": f"<image>\nWhat is in picture {number}?"},
            {"from": "gpt", "value": f"A thing, number {number}."},
        ],
    }


def turns(*texts: str, first: str = "human") -> list[Record]:
    """Return alternating turns."""
    roles = ("human", "gpt") if first == "human" else ("gpt", "human")
    return [{"from": roles[n % 2], "value": text} for n, text in enumerate(texts)]


# name of the fault: (what replaces keys of a fine record, kind, part of what is said)
FAULTS: dict[str, tuple[Any, str, str]] = {
    "no mapping": ("text", "refused", "expected a mapping"),
    "no conversations": ({"conversations": None}, "refused", "expected a list of turns"),
    "empty conversation": ({"conversations": []}, "refused", "the conversation is empty"),
    "turn without value": ({"conversations": [{"from": "human"}]}, "refused", "has no 'value'"),
    "unknown role": (
        {"conversations": [{"from": "robot", "value": "x"}]},
        "refused",
        "unknown role 'robot'",
    ),
    "turns do not alternate": (
        {"conversations": [*turns("<image>\nfirst"), *turns("second", "third")]},
        "refused",
        "turn 2 is 'human' where",
    ),
    "begins with the answer": (
        {"conversations": turns("<image>", "x", first="gpt")},
        "refused",
        "begins with",
    ),
    "no answer": ({"conversations": turns("<image>\nalone")}, "refused", "no assistant turn"),
    "empty answer": (
        {"conversations": turns("<image>\nnothing", " ")},
        "refused",
        "text of 'gpt' is empty",
    ),
    "more tags than images": (
        {"conversations": turns("<image> <image>\ntwo", "x")},
        "refused",
        "2 image tags in the text but 1 image",
    ),
    "image named as a number": ({"image": 7}, "refused", "expected a file name"),
    "image that is missing": ({"image": "nowhere.png"}, "refused", "does not exist"),
    "image without bytes": ({"image": "empty.png"}, "refused", "is empty (0 bytes)"),
    "image cut off": ({"image": "torn.png"}, "refused", "broken or cut off"),
    "image that is none": ({"image": "text.png"}, "refused", "not an image"),
    "half a character": (
        {"conversations": turns("<image>\nhalf \ud83d", "x")},
        "refused",
        "half a character",
    ),
    "too long to learn anything": (
        {"conversations": turns(f"<image>\n{LONG}", "x")},
        "refused",
        "has nothing to learn",
    ),
    "answer is cut": (
        {"conversations": turns("<image>\nlong", LONG)},
        "cut",
        "language.max_length is 2048",
    ),
    "the same record twice": ("copy", "twice", "has the images and turns of record"),
    "the same id twice": ({"id": "fine-3"}, "twice", "has the id of an earlier one"),
    "the same image twice": ({"image": "copy.png"}, "twice", "has the same content as"),
    "a strip": ({"image": "strip.png"}, "odd", "is a strip of 640 x 4 pixels"),
    "text that ends answers": (
        {"conversations": turns("<image>\nstop", "one ### two")},
        "odd",
        "has '###' in it",
    ),
    "wrong encoding": (
        {"conversations": turns("<image>\ncaf\ufffd", "x")},
        "odd",
        "U+FFFD",
    ),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A folder of images, some of them bad."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(IMAGES):
        make_scene("check", 0, number).open().save(folder / f"{number}.png")
    shutil.copy(folder / "5.png", folder / "copy.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no picture")
    whole = (folder / "6.png").read_bytes()
    (folder / "torn.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (640, 4), "red").save(folder / "strip.png")
    return folder


@pytest.fixture(scope="module")
def planted(images, tmp_path_factory) -> tuple[Path, list[Record]]:
    """What `check` finds in 2,000 records with every fault once."""
    records: list[Any] = [record(number) for number in range(SAMPLES - len(FAULTS))]
    for number, (change, _, _) in enumerate(FAULTS.values()):
        if change == "text":
            records.append("a text")
        elif change == "copy":
            records.append({**record(9), "id": "bad-copy"})
        else:
            records.append({**record(SAMPLES + number), "id": f"bad-{number}", **change})
    folder = tmp_path_factory.mktemp("check")
    file = folder / "data.json"
    file.write_text(json.dumps(records))
    words = [f"data.train={file}", f"data.images={images}", f"out={folder / 'out'}"]
    words += ["only=chat", "data.on_bad_sample=quarantine"]
    assert main(["check", "recipe=yivl_llava", *words]) == 0
    lines = (folder / "out/findings.jsonl").read_text().splitlines()
    return folder, [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_once(name, planted):
    _, kind, what = FAULTS[name]
    found = [one for one in planted[1] if one["kind"] == kind and what in one["what"]]
    assert len(found) == 1, (name, planted[1])


def test_nothing_else_is_found(planted):
    assert len(planted[1]) == len(FAULTS)


def test_the_report_tells_lengths_and_counts(planted):
    report = (planted[0] / "out/report.txt").read_text()
    assert f"{SAMPLES} records" in report and "of them supervised" in report
    refused = sum(kind == "refused" for _, kind, _ in FAULTS.values())
    assert f"refused: {refused} (training leaves it out)" in report
    assert "tokens of a sample: median" in report and "####" in report


def test_good_data_are_told_so(images, tmp_path, capsys):
    file = tmp_path / "good.json"
    file.write_text(json.dumps([record(number) for number in range(20)]))
    words = [f"data.train={file}", f"data.images={images}", f"out={tmp_path / 'out'}"]
    assert main(["check", "recipe=yivl_llava", *words]) == 0
    said = capsys.readouterr().out
    assert "nothing is wrong" in said
    assert "a conversation is written with language.template=yi_vl; answers end at '###'" in said
    page = (tmp_path / "out/audit.html").read_text()
    assert page.count("<h2>Stage") == 3 and "data:image/jpeg;base64," in page
    assert '<span class="learned">A thing, number' in page and "http" not in page


def test_data_that_training_would_refuse_are_a_mistake(images, tmp_path, capsys):
    file = tmp_path / "bad.json"
    file.write_text(json.dumps([record(1), record(2, "nowhere.png")]))
    words = [f"data.train={file}", f"data.images={images}", f"out={tmp_path / 'out'}"]
    assert main(["check", "recipe=yivl_llava", *words]) == 2
    assert "nowhere.png: does not exist" in capsys.readouterr().err
    assert (tmp_path / "out/findings.jsonl").is_file()


def test_pieces_are_what_is_read_and_what_is_learned():
    def letters(ids: list[int], keep_special: bool) -> str:
        return "".join(map(chr, ids))

    picture = make_scene("check", 0, 0)
    ids = [65, IMAGE_TOKEN_INDEX, IMAGE_TOKEN_INDEX, 66, 67, 68]
    labels = [IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, 67, 68, IGNORE_INDEX]
    told = list(
        split_into_spans(
            EncodedSample(ids, labels, Sample("x", (), (picture,)), 2),
            letters,
            ImageTransform(56, 56, (0.5, 0.5, 0.5), (1.0, 1.0, 1.0)),
        )
    )
    assert [(one.kind, one.position_count) for one in told] == [
        ("read", 1),
        ("image", 2),
        ("read", 1),
        ("learned", 2),
    ]
    assert told[3].text == "CD" and told[1].image_uri.startswith("data:image/jpeg")


def test_the_audit_shows_different_images_as_the_encoder_sees_them():
    scenes = [make_scene("check", number, 0) for number in range(3)]
    samples = [Sample(f"{n}", (), (scenes[n % 3],)) for n in range(30)] + [Sample("text", (), ())]
    chosen = choose_samples(samples, 6)
    assert len(chosen) == 4 and len({sample.images for sample in chosen}) == 4
    assert len(choose_samples(samples, 2)) == 2

    class Strip:
        name = "strip"

        def open(self):
            return Image.new("RGB", (100, 20), (255, 0, 0))

    encoded = EncodedSample([IMAGE_TOKEN_INDEX], [IGNORE_INDEX], Sample("x", (), (Strip(),)), 1)
    transform = ImageTransform(56, 56, (0.0, 0.0, 1.0), (1.0, 1.0, 1.0))
    (span,) = split_into_spans(encoded, lambda *_: "", transform)
    shown = Image.open(io.BytesIO(base64.b64decode(span.image_uri.partition(",")[2])))
    assert shown.size == (56, 56)  # padded to a square in the mean colour: blue, red, blue
    assert shown.getpixel((28, 2))[2] > 200 and shown.getpixel((28, 28))[0] > 200


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.trian=x"], "Did you mean 'train'?"),
        (["size=6b"], "data"),
        (["data.train=nowhere.json"], "there is no such file"),
    ],
)
def test_mistakes_are_a_line(words, message, capsys):
    assert main(["check", "recipe=yivl_llava", *words]) == 2
    assert message in capsys.readouterr().err
