"""Records of other programs are read with all images and texts, or refused by name."""

from __future__ import annotations

import base64
import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlbench.__main__ import main
from vlbench.data.conversation_files import ConversationFiles
from vlbench.data.conversation_record import record_from_sample, sample_from_record
from vlbench.data.preflight import inspect_source
from vlbench.data.record_keys import is_metadata_key
from vlbench.data.sample import IMAGE_PLACEHOLDER as P
from vlbench.data.shards import WebDatasetShards
from vlbench.errors import BadSample, UserError, escape_to_one_line

ANSWER = {"from": "gpt", "value": "red"}
PLAIN = [{"from": "human", "value": "Colour?"}, ANSWER]
TAGGED = [{"from": "human", "value": "<image>\nColour?"}, ANSWER]
IMAGE = "data:image/jpeg;base64," + base64.b64encode(bytes(60_000)).decode()
HF = [
    {
        "role": "user",
        "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "Colour?"}],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
]

Record = dict[str, Any]


def said(text: str) -> list[Record]:
    return [{"from": "human", "value": text}, ANSWER]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.jpg", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def read(record: Record) -> Any:
    return sample_from_record(record, "record 1", lambda name: name)  # type: ignore[return-value]


# name: (record, texts of the turns, images)
READ: dict[str, tuple[Record, list[str], list[str]]] = {
    "images without a tag": (
        {"images": ["a.jpg"], "conversations": PLAIN},
        [f"{P}\nColour?", "red"],
        ["a.jpg"],
    ),
    "images a text": (
        {"images": "a.jpg", "conversations": TAGGED},
        [f"{P}\nColour?", "red"],
        ["a.jpg"],
    ),
    "image null beside images": (
        {"image": None, "images": ["a.jpg", "b.png"], "conversations": said("<image><image>")},
        [f"{P}{P}", "red"],
        ["a.jpg", "b.png"],
    ),
    "image and images alike": (
        {"image": "a.jpg", "images": ["a.jpg"], "conversations": TAGGED},
        [f"{P}\nColour?", "red"],
        ["a.jpg"],
    ),
    "system as a key": (
        {"system": "Be brief.", "image": "a.jpg", "conversations": PLAIN},
        ["Be brief.", f"{P}\nColour?", "red"],
        ["a.jpg"],
    ),
    "system as a key and a turn alike": (
        {"system": "S", "conversations": [{"from": "system", "value": "S"}, *PLAIN]},
        ["S", "Colour?", "red"],
        [],
    ),
    "an empty system": ({"system": "", "conversations": PLAIN}, ["Colour?", "red"], []),
    "roles in capitals": (
        {
            "image": "a.jpg",
            "conversations": [
                {"from": "Human", "value": "<image>\nColour?"},
                {"from": "GPT", "value": "red"},
            ],
        },
        [f"{P}\nColour?", "red"],
        ["a.jpg"],
    ),
    "role and content": (
        {
            "image": "a.jpg",
            "conversations": [
                {"role": "user", "content": "<image>\nColour?"},
                {"role": "assistant", "content": "red"},
            ],
        },
        [f"{P}\nColour?", "red"],
        ["a.jpg"],
    ),
    "messages with images": (
        {"messages": [{"role": "user", "content": "<image>Hm"}, ANSWER], "images": ["a.jpg"]},
        [f"{P}Hm", "red"],
        ["a.jpg"],
    ),
    "messages with parts": ({"messages": HF}, [f"{P}\nColour?", "red"], ["a.jpg"]),
    "null beside value": (
        {"image": "a.jpg", "video": None, "conversations": [*TAGGED[:1], {**ANSWER, "tools": []}]},
        [f"{P}\nColour?", "red"],
        ["a.jpg"],
    ),
    "where the image came from": (
        {"image": "d/a.jpg", "image_url": "https://x/y.jpg", "path": "/c/a.jpg"}
        | {"conversations": TAGGED},
        [f"{P}\nColour?", "red"],
        ["d/a.jpg"],
    ),
    "what is known about the image": (
        {"image": "a.jpg", "image_id": 7, "width": 4, "num_images": 1, "image_size": [4, 4]}
        | {"conversations": TAGGED},
        [f"{P}\nColour?", "red"],
        ["a.jpg"],
    ),
    "empty conversations beside messages": (
        {"conversations": [], "messages": HF},
        [f"{P}\nColour?", "red"],
        ["a.jpg"],
    ),
    "null in keys of images": (
        {"image_path": [None], "video": {"bytes": None, "path": None}, "conversations": PLAIN},
        ["Colour?", "red"],
        [],
    ),
    "HTML in texts": (
        {
            "conversations": [
                *said('What is <img src="a.jpg"> ?')[:1],
                {**ANSWER, "value": "<video>"},
            ]
        },
        ['What is <img src="a.jpg"> ?', "<video>"],
        [],
    ),
}


@pytest.mark.parametrize("name", READ)
def test_a_record_is_read_with_all_images_and_texts(name):
    record, texts, pictures = READ[name]
    sample = read(record)
    assert [turn.text for turn in sample.turns] == texts and list(sample.images) == pictures
    again = read(record_from_sample(sample, pictures))
    assert (again.turns, again.images) == (sample.turns, sample.images)


# name: (record, part of the message)
REFUSED: dict[str, tuple[Record, str]] = {
    **{
        f"image in {key}": (
            {key: value, "conversations": PLAIN},
            f"'{key}' is not read; name the file in 'image'",
        )
        for key, value in (
            ("image_path", "a.jpg"),
            ("img", "a.jpg"),
            ("image_file", "a.jpg"),
            ("imageFile", "a"),
            ("Image", "a.jpg"),
            ("image2", "a.jpg"),
            ("file_name", "a.jpg"),
            ("picture", {"bytes": "x"}),
            ("source", "a.jpg"),
            ("b64", IMAGE),
        )
    },
    "a second image": (
        {"image": "a.jpg", "image_2": "b.jpg", "conversations": TAGGED},
        "'image_2' is not read",
    ),
    "a second image by address": (
        {"image": "a.jpg", "image_2": "http://x/b.jpg", "conversations": TAGGED},
        "'image_2' is not read",
    ),
    "an image of that name in another folder": (
        {
            "image": "edited/0001.png",
            "source_image": "original/0001.png",
            "conversations": TAGGED,
        },
        "'source_image' is not read",
    ),
    "an image in a mapping, of that name in another folder": (
        {
            "image": "edited/0001.png",
            "source_image": {"path": "original/0001.png", "bytes": None},
            "conversations": TAGGED,
        },
        "'source_image' is not read",
    ),
    "image in a turn": (
        {"conversations": [{**PLAIN[0], "image": "a.jpg"}, ANSWER]},
        "turn 1: 'image' is not read",
    ),
    "a video": ({"video": "0.mp4", "conversations": TAGGED}, "'video' is not read; videos"),
    "a video by its value": ({"clip": ["0.MP4"], "conversations": PLAIN}, "videos are not read"),
    "sound": ({"audio": "a", "conversations": PLAIN}, "'audio' is not read; sound"),
    "tools": ({"tools": "[{}]", "conversations": PLAIN}, "'tools' is not read; tools are"),
    "history": ({"history": [["a", "b"]], "conversations": PLAIN}, "earlier turns are not read"),
    "another name of system": ({"system_prompt": "S", "conversations": PLAIN}, "as 'system'"),
    "two systems": (
        {"system": "A", "conversations": [{"from": "system", "value": "B"}, *PLAIN]},
        "another system turn",
    ),
    "system a list": ({"system": ["A"], "conversations": PLAIN}, "'system' is a list"),
    "two sets of images": (
        {"image": "a.jpg", "images": ["b.png"], "conversations": TAGGED},
        "other images in 'image' than in 'images'",
    ),
    "images in two ways": ({"image": "b.png", "messages": HF}, "expected one way"),
    "two conversations": ({"messages": HF, "conversations": PLAIN}, "expected one of them"),
    "a part that is none": (
        {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}, HF[1]]},
        "turn 1: a part of 'content' is a mapping",
    ),
    "an image in a part of text": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "Colour?", "image": "a.jpg"}],
                },
                HF[1],
            ]
        },
        "turn 1: in a part of 'content' 'image' is not read",
    ),
    "a second image in a part": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": "a.jpg", "path": "b.png"}],
                },
                HF[1],
            ]
        },
        "turn 1: in a part of 'content' 'path' is not read",
    ),
    "the bytes of a small image": (
        {"image": "/9j/4AAQ\n" * 30, "conversations": TAGGED},
        "an image as text; write it to a file",
    ),
    "the address of an image with a query": (
        {"path": "https://x/a.jpg?width=3", "conversations": PLAIN},
        "'path' is not read",
    ),
    "an answer that is not learned": (
        {"conversations": [PLAIN[0], {**ANSWER, "weight": 0}]},
        "turn 2: 'weight' is 0",
    ),
    "tag in the system turn": (
        {"image": "a.jpg", "conversations": [{"from": "system", "value": "<image>"}, *PLAIN]},
        "<image> in a turn of 'system'",
    ),
    "an image as text": (
        {"image": IMAGE, "conversations": TAGGED},
        "an image as text; write it to a file",
    ),
    "an address": (
        {"image": "https://x/a.jpg", "conversations": TAGGED},
        "a URL; download it",
    ),
    "images without tags": (
        {"images": ["a.jpg", "b.png"], "conversations": PLAIN},
        "0 image tags in the text but 2 images; write <image>",
    ),
    "another key of turns": ({"conversatoin": PLAIN}, "no 'conversations'.*mean 'conversations'"),
    "question and answers of several people": (
        {"image": "a.jpg", "question": "Q", "answers": ["A", "B"]},
        'no \'conversations\'; .*expected "conversations": .*"from": "human"',
    ),
    **{
        f"tag {tag[:40]}": ({**more, "conversations": said(f"{tag} Colour?")}, "turn 1: .*" + words)
        for tag, more, words in (
            ("<img>a.jpg</img>", {}, "name the file in 'image'"),
            ("<IMAGE>", {"image": "a.jpg"}, "write <image>"),
            ("<image1> <image2>", {"image": ["a.jpg", "b.png"]}, "write <image>"),
            ("<image 1>", {"image": "a.jpg"}, "write <image>"),
            ("<|image_1|>", {"image": "a.jpg"}, "write <image>"),
            ("<|vision_start|><|image_pad|><|vision_end|>", {"image": "a.jpg"}, "write <image>"),
            ("<ImageHere>", {"image": "a.jpg"}, "write <image>"),
            (f"![it]({IMAGE})", {}, "name the file in 'image'"),
            (f"<img>{IMAGE}</img>", {}, "name the file in 'image'"),
            ("<image/>", {"image": "a.jpg"}, "write <image>"),
            ("< image >", {"image": "a.jpg"}, "write <image>"),
            ("<image>a.jpg</image>", {"image": "a.jpg"}, "write <image>"),
            ("<start_of_image>", {"image": "a.jpg"}, "write <image>"),
            ("<video>", {}, "videos and sound are not read"),
            ("<audio>", {}, "videos and sound are not read"),
        )
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_record_that_would_lose_something_is_refused_in_a_line(name):
    record, words = REFUSED[name]
    with pytest.raises(BadSample, match=words) as caught:
        read({"id": "r1", **record})
    said = str(caught.value)
    assert len(said) < 400 and "\n" not in said and said.startswith("sample r1: ")


def test_a_key_that_may_hold_something_is_told_once_with_a_count(folder, capsys):
    more = {"caption": "red", "width": 8, "conversations": [TAGGED[0], {**ANSWER, "why": "?"}]}
    records = [{"id": n, "image": "a.jpg", **more, "texts": n} for n in range(3)]
    (folder / "data.json").write_text(json.dumps(records))
    found = inspect_source(ConversationFiles(folder / "data.json"))
    assert found.bad_samples == [] and found.unread_key_counts["width"] == 3
    assert (
        found.describe_unread_keys()
        == "'caption' (3 records), 'texts' (3 records), 'turn why' (3 records)"
    )
    words = [f"data.train={folder / 'data.json'}", f"out={folder / 'out'}", "only=chat"]
    assert main(["check", "recipe=yivl_llava", *words]) == 0
    told = capsys.readouterr().out
    assert (
        "key 'caption' is not read (3 records have it)" in told and "nothing is wrong" not in told
    )
    assert "keys that are not used, with the number of records: width (3)" in told
    lines = (folder / "out/findings.jsonl").read_text().splitlines()
    assert sum("is not read" in line for line in lines) == 3


def test_check_counts_images_without_a_tag_and_tags_that_are_text(folder, capsys):
    records = [
        {"id": "a", "images": ["a.jpg"], "conversations": PLAIN},
        {"id": "b", "image": "b.png", "conversations": said("<im_start><image><im_end>")},
        {"id": "c", "conversations": [PLAIN[0], {**ANSWER, "value": "<image> is a tag"}]},
        {"id": "d", "conversations": said("Look: ![it](a.jpg)")},
    ]
    (folder / "data.json").write_text(json.dumps(records))
    words = [f"data.train={folder / 'data.json'}", f"out={folder / 'out'}", "only=chat"]
    assert main(["check", "recipe=yivl_llava", *words]) == 0
    told = capsys.readouterr().out
    assert "1 records have an image and no <image>" in told and "2 images" in told
    assert "'<im_start' in it, which is read as text" in told
    assert "'<image' in it, which is learned as text" in told
    assert "'![it](' in it, which is read as text" in told


def test_a_record_with_images_is_packed_with_them(folder):
    records = [{"id": 1, "images": ["a.jpg", "b.png"], "conversations": said("<image><image>")}]
    records += [{"id": 2, "messages": HF, "topic": "colour"}]
    (folder / "data.json").write_text(json.dumps(records))
    assert main(["pack", f"data={folder / 'data.json'}", f"out={folder / 'shards'}"]) == 0
    source, shards = ConversationFiles(folder / "data.json"), WebDatasetShards(folder / "shards")
    for number in range(2):
        ours, theirs = shards[number], source[number]
        assert (ours.id, ours.turns, ours.unread_keys) == (
            theirs.id,
            theirs.turns,
            theirs.unread_keys,
        )
        assert len(ours.images) == len(theirs.images)


def test_keys_beside_the_caption_of_a_shard_are_looked_at_too(folder):
    about = {"caption": "red", "url": "https://x/y.jpg", "key": "0", "status": "success"}
    with tarfile.open(folder / "x.tar", "w") as tar:
        for number, more in enumerate(({}, {"note": "?"}, {"video": "a.mp4"})):
            for ending, data in (
                ("jpg", (folder / "a.jpg").read_bytes()),
                ("json", json.dumps({**about, **more}).encode()),
            ):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    shards = WebDatasetShards(folder / "x.tar")
    assert shards[0].caption_text == "red" and set(shards[0].unread_keys) == {
        "url",
        "key",
        "status",
    }
    assert shards[1].unread_keys[-1] == "note"
    with pytest.raises(BadSample, match="'video' is not read"):
        shards[2]


def test_texts_and_images_of_a_shard_that_are_not_read_are_named(folder):
    image = (folder / "a.jpg").read_bytes()
    turns = [{"from": "human", "value": "<image>"}, ANSWER]
    members = {
        "0.jpg": image,
        "0.json": b'{"caption": "red"}',
        "0.txt": b"blue",
        "1.jpg": image,
        "1.json": b'{"caption": "red"}',
        "1.txt": b"red\n",
        "2.jpg": image,
        "2.png": (folder / "b.png").read_bytes(),
        "2.json": json.dumps({"image": "2.jpg", "conversations": turns}).encode(),
        "2.mp4": b"?",
    }
    with tarfile.open(folder / "x.tar", "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    shards = WebDatasetShards(folder / "x.tar")
    assert [one.caption_text for one in shards] == ["red"] * 3
    assert [one.unread_keys for one in shards] == [("txt",), (), ("png",)]
    assert shards.notes == ["left out: 1 members that belong to no image, text or json"]


@pytest.mark.parametrize(
    ("given", "label"),
    [
        (7, "7"),
        (0, "0"),
        (1.5, "1.5"),
        ("a\nb", "a\nb"),
        ("a\u2028b", "a\u2028b"),
        ("a\ud800", "a\\ud800"),
    ]
    + [(one, "record 1") for one in (None, "", " ", True, ["a"], {"a": 1})],
)
def test_an_id_is_a_label_that_can_be_printed(given, label):
    sample = read({"id": given, "conversations": PLAIN})
    assert sample.id == label and len(sample.unique_name.splitlines()) == 1
    with pytest.raises(BadSample) as caught:
        read({"id": given, "conversations": []})
    said = str(caught.value)
    assert len(said.splitlines()) == 1 and said.encode().startswith(b"sample ")
    assert said.startswith(f"sample {escape_to_one_line(label)}: ")


@pytest.mark.parametrize(
    ("key", "expected"),
    [("width", True), ("question_id", True), ("turn id", True), ("imageId", True)]
    + [("caption", False), ("image_caption", False), ("rationale", False), ("turn note", False)],
)
def test_which_keys_have_nothing_to_learn(key, expected):
    assert is_metadata_key(key) is expected


OTHER_FILES = {
    "rows.json": (b"PAR1\x15\x04", "is damaged or cut off, or no Parquet"),
    "rows.parquet": (b"PAR1\x15\x04", "is damaged or cut off, or no Parquet"),
    "small.json": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "table.csv": (b"image,question\na.jpg,What?\n", "a table"),
    "named.json": (b"image,question\na.jpg,What?\n", "a table"),
    "data.json.gz": (b"\x1f\x8b\x08\x00", "decompress it"),
    "page.json": (b"<!DOCTYPE html><html>", "web page"),
    "behind_blanks.json": (b"\xef\xbb\xbf\n\n<html>", "web page"),
    "pointer.json": (b"\xef\xbb\xbfversion https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "rows.arrow": (b"ARROW1\0\0", "an Arrow file"),
    "data.json.zst": (b"\x28\xb5\x2f\xfd\0", "zstd.; decompress it"),
    "coco.json": (b'{"info": {}, "annotations": [{"id": 1}]}', "'annotations' holds a list of 1"),
    "long.json": (b'[{"id": ' + b"1" * 5000 + b"}]", "cannot be read as JSON"),
    "data.zip": (b"PK\x03\x04", "unpack it"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_a_file_that_is_no_json_is_called_what_it_is(name, tmp_path):
    content, words = OTHER_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        ConversationFiles(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_bad_sample_keeps_its_identity_on_the_way_out_of_a_worker():
    bad = pickle.loads(pickle.dumps(BadSample("same", "why").with_origin("data.json", 7)))
    assert bad.record_identity == ("data.json", 7) and str(bad) == "sample same (record 7): why"
    assert BadSample("same", "why").record_identity == ("", "same")


def test_a_long_word_in_any_message_is_shortened():
    assert len(str(UserError(f"image {IMAGE}: does not exist"))) < 200
    assert "80,023 characters" in str(BadSample(IMAGE, "x"))
    assert str(UserError("data " + "a/" * 100)) == "data " + "a/" * 100
