"""The tokenizer equals the reference's records; broken files are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

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


def test_a_folder_without_tokenizer_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="sentencepiece"):
        Tokenizer.load(tmp_path)
