"""Dialects of other programs become the same tokens as the LLaVA JSON of the same content."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from vlbench.data import record_images
from vlbench.data.chat_template import YI_VL
from vlbench.data.conversation_files import ConversationFiles
from vlbench.data.image_processing import ImageTransform
from vlbench.data.sample_encoding import SampleEncoder
from vlbench.data.tokenizer import Tokenizer
from vlbench.errors import BadSample, UserError

TINY = Path(__file__).parent / "goldens/yi_vl/tiny_a/checkpoint"
TRANSFORM = ImageTransform(56, 56, (0.5,) * 3, (0.25,) * 3)
TALK = [("Which colour?", "red"), ("Sure? 真的吗？", 'Yes, "quite".')]
CAPTION = 'A red block, "alone"\non a table.'

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dialects")
    Image.new("RGB", (9, 8), "red").save(path / "a.jpg")
    Image.new("RGB", (8, 9), "blue").save(path / "b.png")
    return path


@pytest.fixture(scope="module")
def encoder() -> SampleEncoder:
    return SampleEncoder(Tokenizer.load(TINY), YI_VL, 4, 512)


def llava(talk: list[tuple[str, str]], *images: str) -> dict[str, Any]:
    """Return the LLaVA record of a conversation."""
    turns = [
        {"from": role, "value": text}
        for pair in talk
        for role, text in zip(("human", "gpt"), pair, strict=True)
    ]
    if images:
        turns[0]["value"] = f"{'<image>' * len(images)}\n{turns[0]['value']}"
    return {"id": "r", "conversations": turns, **({"image": list(images)} if images else {})}


def turns(role_key: str, text_key: str, asks: str, answers: str, tag: str = "") -> Rows:
    """Return the turns of TALK with other keys and roles, and a tag before the first."""
    found = []
    for asked, answered in TALK:
        found += [{role_key: asks, text_key: asked}, {role_key: answers, text_key: answered}]
    found[0][text_key] = f"{tag}{found[0][text_key]}"
    return found


def messages(first_part: dict[str, Any], **more: Any) -> Rows:
    """Return TALK as messages whose contents are parts; `more` is in every part, as in Parquet."""
    said = turns("role", "content", "user", "assistant")
    for turn in said:
        turn["content"] = [{**more, "type": "text", "text": turn["content"]}]
    said[0]["content"].insert(0, {**more, **first_part})
    return said


def data_uri(file: Path) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(file.read_bytes()).decode()}"


def stored(file: Path) -> dict[str, Any]:
    """Return an image as the Hugging Face libraries store it."""
    return {"bytes": file.read_bytes(), "path": None}


TAG = "<image>\n"
JSON_DIALECTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "sharegpt": lambda d: {
        "conversations": turns("from", "value", "user", "bing", TAG),
        "image": "a.jpg",
    },
    "sharegpt of roles": lambda d: {
        "conversations": turns("role", "content", "USER", "chatgpt", TAG),
        "images": "a.jpg",
    },
    "sharegpt in one": lambda d: {
        "conversation": turns("from", "content", "human", "model"),
        "image": ["a.jpg"],
    },
    "openai text": lambda d: {
        "messages": turns("role", "content", "user", "assistant", TAG),
        "images": ["a.jpg"],
    },
    "openai parts": lambda d: {
        "messages": messages({"type": "image_url", "image_url": {"url": data_uri(d / "a.jpg")}})
    },
    "openai responses": lambda d: {
        "messages": messages({"type": "input_image", "image_url": "a.jpg"})
    },
    "transformers": lambda d: {"messages": messages({"type": "image", "path": "a.jpg"})},
    "trl": lambda d: {"messages": messages({"type": "image"}), "images": ["a.jpg"]},
    "ms-swift": lambda d: {
        "messages": turns("role", "content", "user", "assistant", "<image>\n"),
        "images": [{"bytes": None, "path": "a.jpg"}],
    },
    "pairs": lambda d: {
        "conversations": [{"input": a, "output": b} for a, b in TALK],
        "image": "a.jpg",
    },
}
ROW_DIALECTS: dict[str, dict[str, Any]] = {
    "query and response": {"query": "Which colour?", "response": "red", "images": ["a.jpg"]},
    "question and answer": {"image": "a.jpg", "question": "Which colour?", "answer": "red"},
    "alpaca": {"instruction": "Which colour?", "input": "", "output": "red", "images": ["a.jpg"]},
}
IMAGE_STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})
PARQUET_DIALECTS: dict[str, Callable[[Path], tuple[dict[str, Any], dict[str, pa.DataType]]]] = {
    "the cauldron": lambda d: (
        {
            "images": [stored(d / "a.jpg")],
            "texts": [{"user": a, "assistant": b, "source": "VQAv2"} for a, b in TALK],
        },
        {"images": pa.list_(IMAGE_STRUCT)},
    ),
    "finevision": lambda d: (
        {
            "images": [stored(d / "a.jpg")],
            "texts": [{"user": a, "assistant": b} for a, b in TALK],
            "source": "vqav2",
            "relevance_ratings": [5, 4],
            "relevance_min": 4,
        },
        {"images": pa.list_(IMAGE_STRUCT)},
    ),
    "llava-onevision": lambda d: (
        {
            "id": "r",
            "image": stored(d / "a.jpg"),
            "conversations": turns("from", "value", "human", "gpt", TAG),
            "data_source": "cambrian",
        },
        {"image": IMAGE_STRUCT},
    ),
    "llava-instruct of trl": lambda d: (
        {
            "messages": messages({"type": "image", "index": 0, "text": None}, index=None),
            "images": [stored(d / "a.jpg")],
        },
        {"images": pa.list_(IMAGE_STRUCT)},
    ),
    "bytes": lambda d: (
        {"image": (d / "a.jpg").read_bytes(), "messages": turns("role", "content", "user", "bot")},
        {},
    ),
    "lists of bytes": lambda d: (
        {
            "images": [(d / "a.jpg").read_bytes()],
            "messages": turns("role", "content", "user", "assistant"),
        },
        {},
    ),
    "files": lambda d: ({"image": "a.jpg", **_as_texts()}, {}),
}


def _as_texts() -> dict[str, Any]:
    return {"texts": [{"user": a, "assistant": b} for a, b in TALK]}


def assert_same(source: ConversationFiles, expected: Any, encoder: SampleEncoder) -> None:
    """Compare tokens, labels and pixels of the first sample with those of a LLaVA record."""
    found = encoder.encode(source[0])
    assert found.input_ids == expected.input_ids and found.labels == expected.labels
    for ours, theirs in zip(found.sample.images, expected.sample.images, strict=True):
        assert torch.equal(TRANSFORM.load_pixels(ours), TRANSFORM.load_pixels(theirs))


def reference(folder: Path, encoder: SampleEncoder, record: dict[str, Any]) -> Any:
    (folder / "llava.json").write_text(json.dumps([record]))
    return encoder.encode(ConversationFiles(folder / "llava.json")[0])


@pytest.mark.parametrize("ending", ["json", "jsonl"])
@pytest.mark.parametrize("name", JSON_DIALECTS)
def test_a_dialect_in_json_has_the_tokens_of_llava(folder, encoder, name, ending):
    expected = reference(folder, encoder, llava(TALK, "a.jpg"))
    record = JSON_DIALECTS[name](folder)
    text = json.dumps([record], indent=1) if ending == "json" else json.dumps(record)
    file = folder / f"{ending}.data"  # what it is tells the format, and not its name
    file.write_text(text)
    assert_same(ConversationFiles(file), expected, encoder)


@pytest.mark.parametrize("name", ROW_DIALECTS)
def test_a_row_in_json_has_the_tokens_of_llava(folder, encoder, name):
    (folder / "rows.json").write_text(json.dumps([ROW_DIALECTS[name]]))
    expected = reference(folder, encoder, llava(TALK[:1], "a.jpg"))
    assert_same(ConversationFiles(folder / "rows.json"), expected, encoder)


def write_parquet(file: Path, rows: Rows, types: dict[str, pa.DataType]) -> Path:
    columns = {name: pa.array([row[name] for row in rows], types.get(name)) for name in rows[0]}
    pq.write_table(pa.table(columns), file)
    return file


@pytest.mark.parametrize("name", PARQUET_DIALECTS)
def test_a_dialect_in_parquet_has_the_tokens_of_llava(folder, encoder, name):
    row, types = PARQUET_DIALECTS[name](folder)
    file = write_parquet(folder / "data.bin", [row, row], types)
    expected = reference(folder, encoder, llava(TALK, "a.jpg"))
    assert_same(ConversationFiles(file), expected, encoder)


@pytest.mark.parametrize("delimiter", [",", "\t"])
@pytest.mark.parametrize(("image", "caption"), [("image", "caption"), ("filepath", "title")])
def test_a_table_has_the_tokens_of_llava(folder, encoder, delimiter, image, caption):
    quoted = '"' + CAPTION.replace('"', '""') + '"'
    lines = [[image, caption, "width"], ["a.jpg", quoted, "9"], ["b.png", "blue", ""]]
    (folder / "table").write_text("\n".join(map(delimiter.join, lines)) + "\n\n")
    captioned = {"image": "a.jpg", "conversations": turns_of("<image>", CAPTION)}
    source = ConversationFiles(folder / "table")
    assert len(source) == 2 and source[1].caption_text == "blue"
    assert_same(source, reference(folder, encoder, captioned), encoder)


def turns_of(asked: str, answered: str) -> Rows:
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]


def test_the_examples_of_the_documentation_are_read(folder, encoder):
    page = (Path(__file__).parent.parent / "docs/reference/data_formats.md").read_text()
    examples = [json.loads(text) for text in re.findall(r"^\| .* \| `({.*})` \|$", page, re.M)]
    (folder / "page.json").write_text(json.dumps(examples))
    source = ConversationFiles(folder / "page.json")
    assert len(examples) == 14 and source.find_bad_samples() == []
    lengths = [len(encoder.encode(source[n]).input_ids) for n in range(13)]
    assert len(set(lengths)) == 1 and source[13].caption_text == "A red block."


def test_several_images_without_tags_come_first_where_a_dialect_has_no_tags(folder, encoder):
    row = {"images": [stored(folder / "a.jpg"), stored(folder / "b.png")], **_as_texts()}
    file = write_parquet(folder / "two.parquet", [row], {"images": pa.list_(IMAGE_STRUCT)})
    expected = reference(folder, encoder, llava(TALK, "a.jpg", "b.png"))
    assert_same(ConversationFiles(file), expected, encoder)


def test_records_of_one_file_may_mix_dialects(folder, encoder):
    records = [make(folder) for make in JSON_DIALECTS.values()]
    expected = reference(folder, encoder, llava(TALK, "a.jpg"))
    (folder / "mixed.jsonl").write_text("\n".join(map(json.dumps, records)))
    source = ConversationFiles(folder / "mixed.jsonl")
    assert {tuple(encoder.encode(source[n]).input_ids) for n in range(len(source))} == {
        tuple(expected.input_ids)
    }
    assert source.find_bad_samples() == []


NO_IMAGE = {"null": None, "an empty list": [], "an empty text": "", "a list of null": [None]}


@pytest.mark.parametrize("value", NO_IMAGE.values(), ids=NO_IMAGE)
def test_a_record_of_text_alone_may_have_the_key_of_an_image(folder, encoder, value):
    expected = reference(folder, encoder, llava(TALK))
    for key in ("image", "images"):
        (folder / "text.json").write_text(json.dumps([{key: value, **_as_texts()}]))
        assert_same(ConversationFiles(folder / "text.json"), expected, encoder)


def test_rows_of_text_alone_between_rows_with_images(folder, encoder):
    rows = [
        {"image": image, **_as_texts()}
        for image in (None, {"bytes": None, "path": None}, stored(folder / "a.jpg"))
    ]
    file = write_parquet(folder / "some.parquet", rows, {"image": IMAGE_STRUCT})
    source = ConversationFiles(file)
    assert [len(source[number].images) for number in range(3)] == [0, 0, 1]
    assert source[2].images[0].open().size == (9, 8)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an answer that is null": (
        {"texts": [{"user": "Q", "assistant": None}]},
        "turn 2: 'assistant' is null",
    ),
    "an answer that is a list": ({"question": "Q", "answer": ["A"]}, "'answer' is a list"),
    "a role of tools": (
        {"messages": turns("role", "content", "user", "tool")},
        "turn 2: unknown role 'tool'",
    ),
    "images out of order": (
        {"messages": messages({"type": "image", "index": 1}), "images": ["a.jpg", "b.png"]},
        "is image 1 of 'images', and 0 would be next",
    ),
    "more places than images": (
        {"messages": messages({"type": "image"}), "images": []},
        "1 image tag in the text but 0 images",
    ),
    "a video in a part": (
        {"messages": messages({"type": "video", "video": "a.mp4"})},
        "turn 1: a part of 'content' is a mapping",
    ),
    "a system prompt in a pair": (
        {"conversations": [{"system": "S", "input": "Q", "output": "A"}]},
        "turn 2: 'system' is not read",
    ),
    "earlier turns": (
        {"query": "Q", "response": "A", "history": [["Q0", "A0"]]},
        "'history' is not read",
    ),
    "a caption by address": (
        {"url": "https://x/a.jpg", "caption": "A block."},
        "'url' is a text .*, a URL; download it",
    ),
    "a question of POPE, with its answer in a key of its own": (
        {"question_id": 1, "image": "a.jpg", "text": "Is there a block?", "label": "yes"},
        "'text' is a question, as the record has 'question_id'",
    ),
    "an answer of KTO that is undesirable": (
        {"image": "a.jpg", "prompt": "Which colour?", "completion": "blue", "label": False},
        "'label' is false: its answer is not to be learned",
    ),
    "the better answer of DPO in a key": (
        {"conversations": [*llava(TALK)["conversations"], {"from": "human", "value": "Why?"}]}
        | {"chosen": {"from": "gpt", "value": "A"}, "rejected": {"from": "gpt", "value": "B"}},
        "'chosen' is not read: write the answer as the last turn",
    ),
    "a question beside what is read as a caption": (
        {"image": "a.jpg", "prompt": "Which colour?", "text": "red"},
        r"'prompt' is not read beside a caption \('text'\): call the answer 'answer'",
    ),
    "a caption without an image": ({"text": "A block."}, "has no 'conversations'; its keys"),
    "a second image": (
        {"image": "a.jpg", "img": "b.png", "caption": "A block."},
        "'img' is not read",
    ),
    "an image among nulls": (
        {"images": ["a.jpg", None], **_as_texts()},
        "entry 2 of 'images' is null; expected a file name",
    ),
    "an image that is a number": ({"image": 7, **_as_texts()}, "'image' is a number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_line_with_the_record_and_the_key(folder, name):
    record, words = WRONG[name]
    (folder / "wrong.json").write_text(json.dumps([llava(TALK), record]))
    source = ConversationFiles(folder / "wrong.json")
    (bad,) = source.find_bad_samples()
    with pytest.raises(BadSample, match=words) as caught:
        raise bad
    said = str(caught.value)
    assert said.startswith("sample record 2: ") and "\n" not in said and len(said) < 500


def test_the_address_of_an_image_whose_bytes_are_there_is_metadata(folder):
    """As of an image that is a file: web-scale tables and COCO's have it."""
    page, jpeg = "https://x/a.jpg", (folder / "a.jpg").read_bytes()
    part = {"type": "image", "image": {"bytes": jpeg, "path": None}, "url": page}
    kinds = {"image": IMAGE_STRUCT}
    rows: list[tuple[dict[str, Any], dict[str, pa.DataType]]] = [
        ({"image": stored(folder / "a.jpg"), "url": page, "caption": "red"}, kinds),
        ({"image": jpeg, "coco_url": page, **_as_texts()}, {}),
        ({"image": {"bytes": jpeg, "path": "a.jpg"}, "picture": "/x/a.jpg", **_as_texts()}, {}),
        ({"messages": messages(part, image=None, url=None)}, {}),
    ]
    for row, types in rows:
        source = ConversationFiles(write_parquet(folder / "address.parquet", [row], types))
        assert source.find_bad_samples() == []
    other = {"image": jpeg, "picture": "b.jpg", **_as_texts()}
    source = ConversationFiles(write_parquet(folder / "address.parquet", [other], {}))
    with pytest.raises(BadSample, match="'picture' is not read"):
        source[0]


def test_an_image_in_a_record_that_is_none_is_named(folder):
    records = [
        {"image": f"data:image/png;base64,{text}", **_as_texts()}
        for text in ("####", "aGk=", "\u00e9")
    ]
    (folder / "none.json").write_text(json.dumps(records))
    source = ConversationFiles(folder / "none.json")
    told = ("record 1: is no base64 text", "record 2: not an image", "record 3: is no base64 text")
    for number, words in enumerate(told):
        with pytest.raises(UserError, match=words):
            source[number].images[0].open()


def test_an_image_as_text_is_looked_at_once_and_only_where_it_begins(folder, monkeypatch):
    looked_at: list[int] = []
    pattern = record_images.BASE64_TEXT

    class NotedPattern:
        def fullmatch(self, text: str) -> Any:
            looked_at.append(len(text))
            return pattern.fullmatch(text)

    monkeypatch.setattr(record_images, "BASE64_TEXT", NotedPattern())
    texts = [base64.b64encode(bytes(90_000)).decode() + end for end in ("", "#")]
    write = folder / "long.json"
    write.write_text(json.dumps([{"images": texts, **_as_texts(), "image_id": "a"}]))
    images = ConversationFiles(write)[0].images
    assert looked_at == [record_images.MAX_PATH_LENGTH] * 2
    for image, words in zip(images, ("not an image", "is no base64 text"), strict=True):
        with pytest.raises(UserError, match=words):
            image.open()


TABLES = {
    "one column too many": ("image,caption\na.jpg,a,b\n", "record 1: has 3 cells.* has 2 columns"),
    "a cell that is empty": ("image,caption\na.jpg,\n", "record 1: turn 2: 'caption' is null"),
    "no image": ("image,caption\n,A block\n", "record 1: has no 'conversations'"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_wrong_row_of_a_table_is_one_line(folder, name):
    text, words = TABLES[name]
    (folder / "wrong.csv").write_text(text)
    (bad,) = ConversationFiles(folder / "wrong.csv").find_bad_samples()
    with pytest.raises(BadSample, match=words):
        raise bad


def test_a_label_beside_a_conversation_is_no_verdict_on_its_answer(folder):
    (folder / "labelled.json").write_text(json.dumps([llava(TALK) | {"label": False}]))
    assert list(ConversationFiles(folder / "labelled.json").find_bad_samples()) == []
