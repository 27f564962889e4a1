"""Samples become the ids and labels of the reference, and bad ones are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from released import records

from vlbench.data.images import File
from vlbench.data.sample import (
    IGNORE,
    IMAGE,
    PLACEHOLDER,
    NoImage,
    Sample,
    Turn,
    encode,
    place_tokens,
)
from vlbench.data.template import YI_VL
from vlbench.data.tokenizer import Tokenizer
from vlbench.mistakes import BadSample

GOLDEN = Path(__file__).parent / "goldens/yi_vl/tiny_a"
CASES = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))
TENSORS = records()
TOKENIZER = Tokenizer.load(GOLDEN / "checkpoint")
PLACES = 16


def turns(conversation: list[dict]) -> tuple[Turn, ...]:
    return tuple(Turn(turn["role"], turn["content"]) for turn in conversation)


def chat(*texts: str, images: int = 0) -> Sample:
    roles = ("human", "assistant") * len(texts)
    pictures = tuple(File(f"{number}.png") for number in range(images))
    return Sample("s1", tuple(map(Turn, roles, texts)), pictures)


def encoded(sample: Sample, max_length: int = 4096, form: str = "chat", places: int = 4):
    return encode(sample, YI_VL, TOKENIZER, places, max_length, form)


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: case["name"])
def test_prompts_have_the_ids_of_the_reference(case):
    pieces = [(YI_VL.prompt(turns(case["conversation"])), False)]
    ids = [i for chunk, _ in place_tokens(pieces, TOKENIZER, 1) for i in chunk]
    assert ids == TENSORS[f"{case['name']}.input_ids"].tolist()
    assert [at for at, token in enumerate(ids) if token == IMAGE] == case["image_positions"]


def golden_rows():
    for name, record in CASES["training"].items():
        for row, sample in enumerate(record["samples"]):
            yield pytest.param(name, row, sample, id=f"{name}-{row}")


@pytest.mark.parametrize(("name", "row", "record"), list(golden_rows()))
def test_training_labels_are_those_of_the_reference(name, row, record):
    answer = record["target"].removeprefix(" ").removesuffix("\n###")
    pictures = tuple(File(image) for image in record["images"])
    sample = Sample("g", (*turns(record["conversation"]), Turn("assistant", answer)), pictures)
    ours = encoded(sample, places=PLACES)
    mask = TENSORS[f"{name}.merged_attention_mask"][row].bool()
    theirs = TENSORS[f"{name}.merged_labels"][row][mask].tolist()[1:] + [IGNORE]
    assert len(ours.ids) == len(theirs)
    last = len(theirs) - record["n_label_tokens"] - 1
    assert ours.labels[last:] == theirs[last:]
    earlier = sum(label != IGNORE for label in ours.labels[:last])
    # The reference record supervises the last answer alone; we supervise every answer.
    assert (earlier > 0) == (len(record["conversation"]) > 1)
    single = [i for i in ours.ids if i != IMAGE]
    reference = [i for i in TENSORS[f"{name}.input_ids"][row].tolist() if i not in (IMAGE, 0)]
    assert single == reference


def test_history_in_pieces_equals_history_in_joint_chunks_here():
    case = next(case for case in CASES["cases"] if case["name"] == "multi_turn")
    pieces = YI_VL.pieces(turns(case["conversation"]))
    ids = [i for chunk, _ in place_tokens(pieces, TOKENIZER, 1) for i in chunk]
    assert ids == TENSORS["multi_turn.input_ids"].tolist()


def test_labels_are_next_tokens_and_never_places():
    sample = encoded(chat(f"{PLACEHOLDER}\nWhat?", "A circle.", "And now?", "Red.", images=1))
    answers = [TOKENIZER.encode(f" {text}\n###") for text in ("A circle.", "Red.")]
    assert [t for t in sample.labels if t != IGNORE] == answers[0] + answers[1]
    for at, label in enumerate(sample.labels):
        assert label in (IGNORE, sample.ids[at + 1] if at + 1 < len(sample.ids) else IGNORE)
    assert IMAGE not in sample.labels and sample.ids.count(IMAGE) == 4


def test_caption_is_places_then_caption_and_newline():
    sample = encoded(chat(f"{PLACEHOLDER}{PLACEHOLDER}Hm?", " Red. ", images=2), form="caption")
    caption = TOKENIZER.encode("Red.\n")
    assert sample.ids == [IMAGE] * 4 + caption
    assert sample.labels == [IGNORE] * 3 + caption + [IGNORE]
    assert [picture.name for picture in sample.sample.pictures] == ["0.png"]
    with pytest.raises(NoImage, match="s1"):
        encoded(chat("Hello", "Hi."), form="caption")


def test_bos_is_written_once_when_the_tokenizer_writes_it_before_every_text():
    tokenizer = Tokenizer(GOLDEN / "checkpoint/tokenizer.model", add_bos=True)
    sample = chat(f"{PLACEHOLDER}What?", "Red.", images=1)
    ids = encode(sample, YI_VL, tokenizer, 4, 4096).ids
    assert ids == [tokenizer.bos, *encoded(sample).ids]
    assert encode(sample, YI_VL, tokenizer, 1, 99, "caption").ids[:2] == [tokenizer.bos, IMAGE]


def test_long_text_is_cut_at_the_end():
    sample = chat(f"{PLACEHOLDER}What?", "Red.", f"{PLACEHOLDER}And?", "Blue.", images=2)
    whole = encoded(sample)
    second = [at for at, token in enumerate(whole.ids) if token == IMAGE][4]
    short = encoded(sample, max_length=second)
    assert short.ids == whole.ids[:second]
    assert short.labels == whole.labels[: second - 1] + [IGNORE]
    assert len(short.sample.pictures) == 1
    with pytest.raises(BadSample, match=f"max_length={second + 2} cuts through image 2"):
        encoded(sample, max_length=second + 2)
    with pytest.raises(BadSample, match="nothing to learn within max_length=20"):
        encoded(sample, max_length=20)


BAD = {
    "no turns": (Sample("s1", ()), "empty"),
    "system alone": (Sample("s1", (Turn("system", "Hi"),)), "empty"),
    "no answer": (chat("Hello"), "no assistant turn"),
    "begins with an answer": (Sample("s1", (Turn("assistant", "Hi"),)), "begins with 'assistant'"),
    "two answers": (
        Sample("s1", (Turn("human", "a"), Turn("assistant", "b"), Turn("assistant", "c"))),
        "turn 3 is 'assistant' where 'human'",
    ),
    "image without tag": (chat("Hello", "Hi", images=1), "0 image tags in the text but 1 image"),
    "tag without image": (chat(PLACEHOLDER, "Hi"), "1 image tag in the text but 0 images"),
    "image in an answer": (chat("Hello", PLACEHOLDER, images=1), "in a turn of 'assistant'"),
}


@pytest.mark.parametrize(("sample", "words"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("form", ["chat", "caption"])
def test_bad_samples_are_refused_in_one_line(sample, words, form):
    with pytest.raises(BadSample, match=words) as caught:
        encoded(sample, form=form)
    assert caught.value.sample_id == "s1" and "\n" not in str(caught.value)
