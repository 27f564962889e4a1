"""Token ids and labels equal those of the reference; bad samples are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from golden_release import load_records
from sentencepiece import SentencePieceTrainer

from vlbench.data.chat_template import CHAT_TEMPLATES, YI_VL
from vlbench.data.image_processing import ImageFile
from vlbench.data.sample import IMAGE_PLACEHOLDER, ChatTurn, Sample
from vlbench.data.sample_encoding import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    NoImage,
    SampleEncoder,
    tokenize_pieces,
)
from vlbench.data.tokenizer import SentencePieceTokenizer, Tokenizer
from vlbench.errors import BadSample

GOLDEN = Path(__file__).parent / "goldens/yi_vl/tiny_a"
CASES = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))
TENSORS = load_records()
TOKENIZER = Tokenizer.load(GOLDEN / "checkpoint")
TOKENS_PER_IMAGE = 16


def turns(conversation: list[dict]) -> tuple[ChatTurn, ...]:
    return tuple(ChatTurn(turn["role"], turn["content"]) for turn in conversation)


def chat(*texts: str, images: int = 0) -> Sample:
    roles = ("human", "assistant") * len(texts)
    pictures = tuple(ImageFile(f"{number}.png") for number in range(images))
    return Sample("s1", tuple(map(ChatTurn, roles, texts)), pictures)


def encoded(
    sample: Sample, max_length: int = 4096, sample_format: str = "chat", tokens_per_image: int = 4
):
    return SampleEncoder(TOKENIZER, YI_VL, tokens_per_image, max_length, sample_format).encode(
        sample
    )


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: case["name"])
def test_prompts_have_the_ids_of_the_reference(case):
    pieces = [(YI_VL.render_prompt(turns(case["conversation"])), False)]
    ids = [i for chunk, _ in tokenize_pieces(pieces, TOKENIZER, 1) for i in chunk]
    assert ids == TENSORS[f"{case['name']}.input_ids"].tolist()
    assert [at for at, token in enumerate(ids) if token == IMAGE_TOKEN_INDEX] == case[
        "image_positions"
    ]


def golden_rows():
    for name, record in CASES["training"].items():
        for row, sample in enumerate(record["samples"]):
            yield pytest.param(name, row, sample, id=f"{name}-{row}")


@pytest.mark.parametrize(("name", "row", "record"), list(golden_rows()))
def test_training_labels_are_those_of_the_reference(name, row, record):
    answer = record["target"].removeprefix(" ").removesuffix("\n###")
    pictures = tuple(ImageFile(image) for image in record["images"])
    sample = Sample("g", (*turns(record["conversation"]), ChatTurn("assistant", answer)), pictures)
    ours = encoded(sample, tokens_per_image=TOKENS_PER_IMAGE)
    mask = TENSORS[f"{name}.merged_attention_mask"][row].bool()
    theirs = TENSORS[f"{name}.merged_labels"][row][mask].tolist()[1:] + [IGNORE_INDEX]
    assert len(ours.input_ids) == len(theirs)
    last = len(theirs) - record["n_label_tokens"] - 1
    assert ours.labels[last:] == theirs[last:]
    earlier = sum(label != IGNORE_INDEX for label in ours.labels[:last])
    # The reference record supervises the last answer alone; we supervise every answer.
    assert (earlier > 0) == (len(record["conversation"]) > 1)
    single = [i for i in ours.input_ids if i != IMAGE_TOKEN_INDEX]
    reference = [
        i for i in TENSORS[f"{name}.input_ids"][row].tolist() if i not in (IMAGE_TOKEN_INDEX, 0)
    ]
    assert single == reference


def test_history_in_pieces_equals_history_in_joint_chunks_here():
    case = next(case for case in CASES["cases"] if case["name"] == "multi_turn")
    pieces = YI_VL.render_pieces(turns(case["conversation"]))
    ids = [i for chunk, _ in tokenize_pieces(pieces, TOKENIZER, 1) for i in chunk]
    assert ids == TENSORS["multi_turn.input_ids"].tolist()


@pytest.fixture(scope="module")
def spaced(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer that puts a space before every text, as Llama 2's and Mistral's do."""
    folder = tmp_path_factory.mktemp("spaced")
    SentencePieceTrainer.train(
        input=__file__,
        model_prefix=str(folder / "tokenizer"),
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    return Tokenizer.load(folder)


@pytest.mark.parametrize("name", list(CHAT_TEMPLATES))
def test_a_model_is_asked_with_the_ids_that_it_was_trained_on(name, spaced):
    """Wherever a conversation is cut, also by tokenizers that put a space before every text."""
    template = CHAT_TEMPLATES[name].bind_eos(spaced.eos_token)
    assert spaced.encode("What?", False) != spaced.encode(" What?", False)
    sample = chat(f"{IMAGE_PLACEHOLDER}\nWhat?", "A circle.", "And now?", "Red.", images=1)
    trained = SampleEncoder(spaced, template, 4, 4096).encode(sample)
    for answered in (0, 1):
        text = template.render_prompt(sample.turns[: 1 + 2 * answered])
        asked = [i for ids, _ in tokenize_pieces([(text, False)], spaced, 4) for i in ids]
        assert trained.input_ids[: len(asked)] == asked
        answer = spaced.decode(trained.input_ids[len(asked) :])
        assert answer.lstrip().startswith(sample.turns[1 + 2 * answered].text)
        first_label = trained.labels[len(asked) - 1]
        assert first_label == trained.input_ids[len(asked)]
        assert trained.labels[len(asked) - 2] == IGNORE_INDEX


def test_labels_are_next_tokens_and_never_image_positions():
    sample = encoded(chat(f"{IMAGE_PLACEHOLDER}\nWhat?", "A circle.", "And now?", "Red.", images=1))
    answers = [TOKENIZER.encode(f" {text}\n###") for text in ("A circle.", "Red.")]
    assert [t for t in sample.labels if t != IGNORE_INDEX] == answers[0] + answers[1]
    for at, label in enumerate(sample.labels):
        assert label in (
            IGNORE_INDEX,
            sample.input_ids[at + 1] if at + 1 < len(sample.input_ids) else IGNORE_INDEX,
        )
    assert IMAGE_TOKEN_INDEX not in sample.labels and sample.input_ids.count(IMAGE_TOKEN_INDEX) == 4


def test_a_caption_is_image_positions_then_text_and_newline():
    sample = encoded(
        chat(f"{IMAGE_PLACEHOLDER}{IMAGE_PLACEHOLDER}Hm?", " Red. ", images=2),
        sample_format="caption",
    )
    caption = TOKENIZER.encode("Red.\n")
    assert sample.input_ids == [IMAGE_TOKEN_INDEX] * 4 + caption
    assert sample.labels == [IGNORE_INDEX] * 3 + caption + [IGNORE_INDEX]
    assert [picture.name for picture in sample.sample.images] == ["0.png"]
    with pytest.raises(NoImage, match="s1"):
        encoded(chat("Hello", "Hi."), sample_format="caption")


def test_a_caption_is_the_answer_behind_the_first_image():
    sample = chat("Hi", "Hello!", f"{IMAGE_PLACEHOLDER}\nWhat is it?", "A lamp.", images=1)
    assert sample.caption_text == "A lamp." and sample.beyond_caption == (1, 0)
    assert encoded(sample, sample_format="caption").input_ids == [
        *[IMAGE_TOKEN_INDEX] * 4,
        *TOKENIZER.encode("A lamp.\n"),
    ]
    silent = chat("Hi", "Hello!", f"{IMAGE_PLACEHOLDER}What is it?", images=1)
    with pytest.raises(BadSample, match="no answer follows its first image"):
        encoded(silent, sample_format="caption")


def test_bos_is_written_once_when_the_tokenizer_writes_it_before_every_text():
    tokenizer = SentencePieceTokenizer(GOLDEN / "checkpoint/tokenizer.model", add_bos_token=True)
    sample = chat(f"{IMAGE_PLACEHOLDER}What?", "Red.", images=1)
    ids = SampleEncoder(tokenizer, YI_VL, 4, 4096).encode(sample).input_ids
    assert ids == [tokenizer.bos_token_id, *encoded(sample).input_ids]
    caption = SampleEncoder(tokenizer, YI_VL, 1, 99, "caption").encode(sample)
    assert caption.input_ids[:2] == [
        tokenizer.bos_token_id,
        IMAGE_TOKEN_INDEX,
    ]


def test_long_text_is_cut_at_the_end():
    sample = chat(
        f"{IMAGE_PLACEHOLDER}What?", "Red.", f"{IMAGE_PLACEHOLDER}And?", "Blue.", images=2
    )
    whole = encoded(sample)
    second = [at for at, token in enumerate(whole.input_ids) if token == IMAGE_TOKEN_INDEX][4]
    short = encoded(sample, max_length=second)
    assert short.input_ids == whole.input_ids[:second]
    assert short.labels == whole.labels[: second - 1] + [IGNORE_INDEX]
    assert len(short.sample.images) == 1
    lost = whole.supervised_token_count - short.supervised_token_count
    assert short.is_truncated and short.lost_supervised_tokens == lost > 0
    assert not whole.is_truncated and whole.lost_supervised_tokens == 0
    with pytest.raises(BadSample, match=f"max_length={second + 2} cuts through image 2"):
        encoded(sample, max_length=second + 2)
    with pytest.raises(BadSample, match="nothing to learn within max_length=20"):
        encoded(sample, max_length=20)


BAD = {
    "no turns": (Sample("s1", ()), "empty"),
    "system alone": (Sample("s1", (ChatTurn("system", "Hi"),)), "empty"),
    "no answer": (chat("Hello"), "no assistant turn"),
    "begins with an answer": (
        Sample("s1", (ChatTurn("assistant", "Hi"),)),
        "begins with 'assistant'",
    ),
    "two answers": (
        Sample(
            "s1", (ChatTurn("human", "a"), ChatTurn("assistant", "b"), ChatTurn("assistant", "c"))
        ),
        "turn 3 is 'assistant' where 'human'",
    ),
    "image without tag": (chat("Hello", "Hi", images=1), "0 image tags in the text but 1 image"),
    "tag without image": (chat(IMAGE_PLACEHOLDER, "Hi"), "1 image tag in the text but 0 images"),
    "image in an answer": (chat("Hello", IMAGE_PLACEHOLDER, images=1), "in a turn of 'assistant'"),
}


@pytest.mark.parametrize(("sample", "words"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("sample_format", ["chat", "caption"])
def test_bad_samples_are_refused_in_one_line(sample, words, sample_format):
    with pytest.raises(BadSample, match=words) as caught:
        encoded(sample, sample_format=sample_format)
    assert caught.value.sample_id == "s1" and "\n" not in str(caught.value)
