"""Prompts and images of MMMU and CMMMU are those of the reference scripts, byte by byte."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from vlbench.data.chat_template import CHAT_TEMPLATES
from vlbench.data.image_processing import ImageTransform, ZeroImage, mean_colour
from vlbench.errors import UserError
from vlbench.evaluate.tasks.benchmark_prompts import prompt_or_skip, prompt_protocol
from vlbench.evaluate.tasks.benchmark_records import read_cmmmu_records, read_mmmu_records
from vlbench.evaluate.tasks.benchmark_types import (
    BenchmarkPrompt,
    BenchmarkRecord,
    GenerationLimits,
    RecordImage,
    SkippedRecord,
)

GOLDEN = Path(__file__).parent / "goldens/evaluation"
CASES = json.loads((GOLDEN / "prompts.json").read_text(encoding="utf-8"))
SPLITS = ("dev", "val", "test")
MMMU = {r.id: r for s in SPLITS for r in read_mmmu_records(str(GOLDEN / "mmmu_tiny"), s)}
CMMMU = {r.id: r for s in SPLITS for r in read_cmmmu_records(str(GOLDEN / "cmmmu_tiny"), s)}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def shown(asked: BenchmarkPrompt, record: BenchmarkRecord) -> list[str | None]:
    """Name the images as the goldens do: MMMU by column, CMMMU by file, None for zeros."""
    names = {image: name for name, image in record.images.items()}
    return [None if isinstance(one, ZeroImage) else names[one] for one in asked.images]


def generation_limits(task: str, protocol: str) -> GenerationLimits:
    """Return the limits of a protocol."""
    return prompt_protocol(task, protocol).generation_limits


def asked(record: BenchmarkRecord, protocol: str) -> BenchmarkPrompt:
    """Return the prompt of a record that must not be skipped."""
    made = prompt_or_skip(record, protocol)
    assert isinstance(made, BenchmarkPrompt), made
    return made


@pytest.mark.parametrize("case", CASES["mmmu"], ids=lambda case: case["id"])
def test_mmmu(case):
    record = MMMU[case["id"]]
    yi, golden = asked(record, "yi"), case["yi"]
    assert yi.text == golden["final_input_prompt"]
    assert shown(yi, record) == [golden["image"]]
    assert CHAT_TEMPLATES["yi_vl"].render_prompt((yi.user_turn,)) == golden["model_input"]
    official, golden = asked(record, "official"), case["mmmu_official"]
    assert official.text == golden["final_input_prompt"]
    assert (
        official.user_turn.text.replace("<image_placeholder>", "<image>")
        == golden["llava_user_turn"]
    )
    assert shown(official, record) == [golden["image"]]


@pytest.mark.parametrize("protocol", ["lmms", "lmms_test"])
@pytest.mark.parametrize("case", CASES["mmmu"], ids=lambda case: case["id"])
def test_mmmu_by_lmms_eval(case, protocol):
    record, golden = MMMU[case["id"]], case["lmms_eval_head"]
    made = prompt_or_skip(record, protocol)
    if isinstance(golden["doc_to_visual"], dict):  # the reference raises
        assert isinstance(made, SkippedRecord)
        assert made.reason == "cites image_10, which it does not have: the reference breaks"
        return
    assert isinstance(made, BenchmarkPrompt)
    key = {"lmms": "doc_to_text", "lmms_test": "doc_to_text_no_kwargs"}[protocol]
    assert made.text == golden[key]
    assert shown(made, record) == golden["doc_to_visual"]


@pytest.mark.parametrize("case", CASES["cmmmu"], ids=lambda case: case["id"])
def test_cmmmu(case):
    record, golden = CMMMU[case["id"]], case["yi"]
    made = prompt_or_skip(record, "yi")
    if golden.get("skipped"):
        assert isinstance(made, SkippedRecord) and "its answer is withheld" in made.reason
    else:
        assert isinstance(made, BenchmarkPrompt)
        assert made.text == golden["final_input_prompt"]
        assert shown(made, record) == [golden["image"]]
        assert CHAT_TEMPLATES["yi_vl"].render_prompt((made.user_turn,)) == golden["model_input"]
    lmms, golden = asked(record, "lmms"), case["lmms_eval_head"]
    assert lmms.text == golden["doc_to_text"]
    columns = dict(zip(case["images"].values(), case["images"], strict=True))
    assert [columns[file] for file in shown(lmms, record)] == golden["doc_to_visual"]


def of_cmmmu(files: str = "q_1_001.png", **changes: object) -> BenchmarkRecord:
    """Return a record of CMMMU with these images and changes."""
    pictures = {file: RecordImage("1", file, b"") for file in files.split()}
    start = replace(CMMMU["1101"], question="问", options=tuple("甲乙丙丁"), answer="A")
    return replace(start, images=pictures, **changes)


def of_mmmu(columns: int = 1, **changes: object) -> BenchmarkRecord:
    """Return a record of MMMU with so many images and these changes."""
    pictures = {f"image_{n + 1}": RecordImage("1", f"{n + 1}.png", b"") for n in range(columns)}
    return replace(MMMU["validation_Math_11"], images=pictures, **changes)


def lines(made: BenchmarkPrompt) -> list[str]:
    """Return the options as they stand in a prompt."""
    return [line for line in made.text.split("\n") if line.startswith("(")]


def test_equal_options_become_one_and_later_letters_shift():
    record = CMMMU["1107"]
    assert record.options[1:3] == ("80ms", "80ms")
    options = [f"({letter}) {record.options[at]}" for letter, at in (("A", 0), ("B", 1), ("C", 3))]
    assert lines(asked(record, "yi")) == options
    assert len(lines(asked(record, "lmms"))) == 4
    reason = prompt_or_skip(replace(record, answer="D"), "yi").reason
    assert reason == "its answer is D, and it has 3 different options: the reference breaks"


TWO = "a_1_001.png a_1_002.png"
TAGS = ('<img="a_1_001.png">', '图<img="a_1_002.png">', "丙", "丁")
CHOICES = {
    "the question's first image": (of_cmmmu("a_1_001.png q_1_002.png q_1_001.png"), 1),
    "two of the options hide it": (of_cmmmu(f"q_1_001.png {TWO}"), "zero"),
    "two of the options alone": (of_cmmmu(TWO, options=TAGS), "zero"),
    "one of the options alone": (of_cmmmu("a_1_001.png"), "has no image in its question"),
    "one that an option cites counts twice": (of_cmmmu("a_1_001.png", options=TAGS), "zero"),
    "none": (of_cmmmu(""), "has no image in its question"),
    "of neither kind": (of_cmmmu("x.png"), "has no image in its question"),
    "of no option": (of_cmmmu("q_1_001.png a_1_001.png a_1_007.png"), "a_1_007.png belongs to no"),
    "of an unknown type": (of_cmmmu(type="问答"), "its type is 问答: the reference leaves it out"),
    "without an answer": (of_cmmmu(answer=None), "its answer is withheld"),
}


@pytest.mark.parametrize(("record", "expected"), CHOICES.values(), ids=CHOICES)
def test_what_yi_shows_of_cmmmu(record, expected):
    made = prompt_or_skip(record, "yi")
    if isinstance(made, SkippedRecord):
        assert expected in made.reason
    elif expected == "zero":
        assert made.images == (ZeroImage(),)
    else:
        assert made.images == (list(record.images.values())[expected],)


def test_tags_of_options_go_by_the_numbers_of_their_images():
    record = of_cmmmu(f"q_1_001.png {TWO}", options=TAGS)
    assert lines(asked(record, "yi")) == ["(A) ", "(B) 图", "(C) 丙", "(D) 丁"]
    swapped = replace(record, options=(TAGS[1], TAGS[0], *TAGS[2:]))
    assert lines(asked(swapped, "yi"))[:2] == [f"(A) {TAGS[1]}", f"(B) {TAGS[0]}"]


@pytest.mark.parametrize(
    ("question", "options", "zero"),
    [
        ("<image 2>?", ("a", "b"), False),  # image_1 is shown whatever is cited
        ("<image 1>?", ("<image 2>", "b"), False),
        ("Which?", ("<image 1>", "b"), True),  # one is counted twice without a tag in the question
        ("<image 1>?", ("<image 2>", "<image 3>"), True),
        ("<image 1>?", ("<image 2> <image 2>", "b"), True),
    ],
)
def test_what_yi_shows_of_mmmu(question, options, zero):
    record = of_mmmu(3, question=question, options=options, answer="A")
    assert asked(record, "yi").images == ((ZeroImage() if zero else record.images["image_1"]),)
    assert asked(record, "official").images == (record.images["image_1"],)


def test_mmmu_without_its_first_image():
    record = MMMU["validation_Math_10"]
    assert asked(record, "yi").images == (ZeroImage(),)
    assert "the reference draws a letter" in prompt_or_skip(record, "official").reason
    lmms = asked(record, "lmms")
    assert lmms.images == () and lmms.user_turn.text == lmms.text


def test_an_image_is_shown_once_or_as_often_as_it_is_cited():
    record = MMMU["validation_Accounting_8"]
    assert record.question.count("<image 1>") == 2
    made = asked(record, "lmms")
    assert made.images == (record.images["image_1"],)
    assert made.user_turn.text == f"<image_placeholder>\n{made.text}"
    record = of_cmmmu(question='<img="q_1_001.png"><img="q_1_001.png">')
    made = asked(record, "lmms")
    assert made.images == (record.images["q_1_001.png"],) * 2
    assert made.user_turn.text.startswith("<image_placeholder> <image_placeholder>\n请回答")
    missing = prompt_or_skip(of_cmmmu(question="<图片 2>"), "lmms")
    assert missing.reason.startswith("cites image 2, which it does not have")


@pytest.mark.parametrize("answer", ["E", "AB", ("A", "B"), "1"])
def test_an_answer_without_an_option(answer):
    record = of_mmmu(answer=answer)
    for protocol in ("yi", "official"):
        assert "none of its 4 options" in prompt_or_skip(record, protocol).reason
    assert isinstance(prompt_or_skip(record, "lmms"), BenchmarkPrompt)
    assert isinstance(prompt_or_skip(replace(record, type="open"), "yi"), BenchmarkPrompt)


@pytest.mark.parametrize("pad", [True, False])
def test_no_image_is_exactly_zero(pad):
    transform = ImageTransform(56, 56, MEAN, STD, pad=pad)
    pixels = transform(ZeroImage().open())
    assert pixels.dtype == torch.float32 and torch.equal(pixels, torch.zeros(3, 56, 56))
    black = ZeroImage().open()
    black.info.clear()
    assert transform(black).abs().min() > 1
    mean = transform(Image.new("RGB", (9, 9), mean_colour(MEAN)))
    assert 0 < mean.abs().max() < 0.02  # what 8 bits can do


def test_how_answers_are_generated():
    assert generation_limits("mmmu", "yi") == generation_limits("cmmmu", "yi")
    yi = generation_limits("mmmu", "yi")
    assert (yi.max_new_tokens, yi.stop, yi.reference_difference) == (64, "###", "")
    tokens = {name: generation_limits("mmmu", name).max_new_tokens for name in ("official", "lmms")}
    assert tokens == {"official": 128, "lmms": 128}
    assert generation_limits("mmmu", "lmms_test").max_new_tokens == 512
    assert generation_limits("cmmmu", "lmms").max_new_tokens == 16
    assert "5 beams" in generation_limits("mmmu", "official").reference_difference


@pytest.mark.parametrize(
    ("task", "protocol", "words"),
    [
        (
            "mmmu",
            "yii",
            "mmmu has no prompts by protocol 'yii'; .* Did you mean 'yi'",
        ),
        ("cmmmu", "official", "there are yi, lmms. The benchmark's own code has none"),
        ("mmu", "yi", "no task 'mmu'; there are mmmu, cmmmu. Did you mean 'mmmu'"),
    ],
)
def test_names_that_do_not_exist(task, protocol, words):
    with pytest.raises(UserError, match=words):
        prompt_protocol(task, protocol)
