"""The tokenizer equals the reference's records; broken files are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from sentencepiece import SentencePieceTrainer
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vlbench.data.tokenizer import Tokenizer
from vlbench.errors import UserError

GOLDEN = Path(__file__).parent / "goldens" / "yi_vl"
TOKENIZERS = Path(__file__).parent / "goldens" / "tokenizers"
CASES = json.loads((GOLDEN / "tokenizer_cases.json").read_text(encoding="utf-8"))
PLACEHOLDER = "<image_placeholder>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(GOLDEN / "checkpoint")


def test_ids_of_the_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == CASES["len_tokenizer"]
    for name in ("bos", "eos", "unk"):
        assert getattr(tokenizer, f"{name}_token_id") == CASES[name]


@pytest.mark.parametrize("case", CASES["encode"], ids=lambda case: repr(case["text"])[:30])
def test_encode_as_the_reference(tokenizer: Tokenizer, case: dict) -> None:
    assert tokenizer.encode(case["text"]) == case["ids"]


@pytest.mark.parametrize("case", CASES["encode_with_image"], ids=lambda case: repr(case["text"]))
def test_encode_around_images_as_the_reference(tokenizer: Tokenizer, case: dict) -> None:
    parts = [tokenizer.encode(part) for part in case["text"].split(PLACEHOLDER)]
    ids = parts[0] + [index for part in parts[1:] for index in (-200, *part)]
    assert ids == case["ids"]


@pytest.mark.parametrize("case", CASES["decode"], ids=lambda case: str(case["ids"])[:30])
def test_decode_as_the_reference(tokenizer: Tokenizer, case: dict) -> None:
    assert tokenizer.decode(case["ids"]) == case["skip_special"]
    assert tokenizer.decode(case["ids"], keep_special=True) == case["keep_special"]


@pytest.mark.parametrize("index", [-200, -1, 1600])
def test_ids_that_do_not_exist_are_refused(tokenizer: Tokenizer, index: int) -> None:
    with pytest.raises(ValueError, match=str(index)):
        tokenizer.decode([5, index])


def test_bos_and_added_tokens_of_a_checkpoint(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "checkpoint" / "tokenizer.model", tmp_path)
    config = json.loads((GOLDEN / "checkpoint" / "tokenizer_config.json").read_text())
    config["add_bos_token"] = True
    config["added_tokens_decoder"] = {"1600": {"content": "<new>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab_size == 1601
    assert tokenizer.encode("a<new>") == [1, 1331, 1600]
    assert tokenizer.decode([1600, 1331]) == "<new> a"  # added, but no special token


VARIANTS = json.loads((TOKENIZERS / "cases.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", VARIANTS)
def test_other_ways_to_say_which_tokens_are_special(name: str, tmp_path: Path) -> None:
    """The records are from LlamaTokenizer (slow, legacy) of transformers 4.36.2."""
    variant = VARIANTS[name]
    shutil.copy(TOKENIZERS / "tokenizer.model", tmp_path)
    for file, content in variant["files"].items():
        (tmp_path / file).write_text(json.dumps(content))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab_size == variant["size"]
    for case in variant["cases"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decoded"], case["text"]
    (tmp_path / "copy").mkdir()
    tokenizer.save(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").encode("<extra_0>") == tokenizer.encode("<extra_0>")


# (text, ids, decoded, decoded without special tokens) of LlamaTokenizer (slow) of transformers
# 4.36.2 with legacy=False and add_bos_token
NEW_MANNER = [
    (
        "a<|endoftext|>USER: and ASSISTANT:",
        [1, 266, 2, *(1193, 1186, 1183, 1196, 1163, 312, 494, 1186, 1186, 659, 1175)]
        + [1108, 1175, 1163],
        "<|startoftext|> a<|endoftext|>USER: and ASSISTANT:",
        "aUSER: and ASSISTANT:",
    ),
    ("a<|endoftext|> b", [1, 266, 2, 296], "<|startoftext|> a<|endoftext|> b", "a b"),
    ("<|endoftext|>", [1, 2], "<|startoftext|><|endoftext|>", ""),
    ("<|startoftext|>a", [1, 1, 1130], "<|startoftext|><|startoftext|>a", "a"),
    (" a", [1, 1127, 266], "<|startoftext|>  a", " a"),
    ("  a  b", [1, 1127, 1127, 266, 1127, 296], "<|startoftext|>   a  b", "  a  b"),
    ("\u2581a", [1, 1127, 266], "<|startoftext|>  a", " a"),
    ("a <unk>", [1, 266, 1127, 0], "<|startoftext|> a <unk>", "a "),
    ("", [1], "<|startoftext|>", ""),
]


@pytest.fixture(scope="module")
def llava_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A folder as LLaVA-1.5's own: `legacy: false`, and no tokenizer.json."""
    folder = tmp_path_factory.mktemp("llava")
    shutil.copy(TOKENIZERS / "tokenizer.model", folder)
    config = {"add_bos_token": True, "legacy": False, "bos_token": "<|startoftext|>"}
    config |= {"eos_token": "<|endoftext|>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(folder)


@pytest.mark.parametrize(("text", "ids", "whole", "plain"), NEW_MANNER)
def test_without_legacy_no_space_is_put_behind_special_tokens(
    text: str, ids: list[int], whole: str, plain: str, llava_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    assert llava_tokenizer.encode(text) == ids
    assert llava_tokenizer.decode(ids, keep_special=True) == whole
    assert llava_tokenizer.decode(ids) == plain
    llava_tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).encode(text) == ids


@pytest.mark.parametrize(("said", "ids"), [({}, [1, 266]), ({"add_bos_token": None}, [266])])
def test_a_begin_of_text_that_is_not_spoken_of_is_put_before_it(
    said: dict, ids: list[int], tmp_path: Path
) -> None:
    """As the reference's LlamaTokenizer does, and for it null is false."""
    shutil.copy(TOKENIZERS / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    assert Tokenizer.load(tmp_path).encode("a") == ids


def test_a_model_that_no_other_file_describes_has_its_own_special_tokens(tmp_path: Path) -> None:
    """As Llama's: `<s>` and `</s>` are in it, and Yi's are not."""
    with (tmp_path / "tokenizer.model").open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(["ab ba"] * 9),
            model_writer=file,
            vocab_size=8,
            hard_vocab_limit=False,
            model_type="char",
            minloglevel=2,
        )
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.role_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert tokenizer.encode("a</s>")[::3] == [tokenizer.bos_token_id, tokenizer.eos_token_id]


def test_an_end_that_a_tokenizer_puts_behind_texts_is_not_part_of_a_prompt(tmp_path: Path) -> None:
    tokens = {"<s>": 0, "</s>": 1, "a": 2, "b": 3}
    words = tokenizers.Tokenizer(models.WordLevel(tokens, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["<s>", "</s>"])
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    roles = {"bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **roles).save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("a b") == [0, 2, 3]
    assert tokenizer.encode("a b", add_bos=False) == [2, 3]


def test_a_folder_without_tokenizer_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="sentencepiece"):
        Tokenizer.load(tmp_path)
