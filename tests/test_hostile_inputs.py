"""Small inputs that would hang a command, fill the memory, or end in a trace: one line for each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from forked_command import run_command

from vlbench.data import tokenizer_limits
from vlbench.data.conversation_record import sample_from_record
from vlbench.data.tokenizer import load_library_tokenizer
from vlbench.data.tokenizer_patterns import pattern_refusal
from vlbench.errors import BadSample, UserError
from vlbench.evaluate.tasks.answer_formats import _flatten_records
from vlbench.model.language_model import TINY_LANGUAGE_FOLDER
from vlbench.text_files import parse_json
from vlbench.train import dry_run

FIT = ["fit", "recipe=yivl_llava", "dry_run=true"]
DEEP = 5_000  # brackets
LONG = "9" * 5_001  # digits; Python converts 4,300
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{now}: &{now} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, now in zip("abcdefgh", "bcdefghi", strict=True)
)
TYPED = {
    "steps": ("stages.chat.steps=1000000000000000000", "at most 1000000000"),
    "batch": ("stages.chat.global_batch_size=1000000000000", "at most 1000000"),
    "row": ("stages.chat.max_tokens_per_row=1000000000", "at most 1048576"),
    "length": ("language.max_length=1000000000000", "at most 1000000000"),
    "scenes": ("data.samples=1000000000000000", "at most 1000000000"),
    "questions": ("data.questions=1000000000000", "at most 1000000000"),
    "image": ("stages.chat.image_size=56000", "at most 4096"),
    "nodes": ("trainer.num_nodes=1000000000", "at most 100000"),
    "digits": (f"seed={LONG}", "5,001 digits"),
    "negative digits": (f"stages.chat.steps=-{LONG}", "digits"),
    "brackets": ("connector={a: " + "[" * DEEP, "connector"),
    "braces": ("connector=" + "{a: " * DEEP, "connector"),
    "pattern": ("data.train=x{0..99999999}.tar", "names 100,000,000 files"),
    "patterns": ("data.train={0..9999}{0..9999}{0..9999}.tar", "at most 1,000,000"),
    "lists": ("data.train=" + "{a,b}" * 40 + ".tar", "at most 1,000,000"),
    "long range": (f"data.train=x{{0..{LONG}}}.tar", "at most 1,000,000"),
}
CONNECTORS = {
    "count": ("{name: llava_mlp, depth: 1000000000}", "connector.depth must be a number from"),
    "ratio": ("{name: llava_mlp, mlp_ratio: 1e300}", "connector.mlp_ratio must be a number from"),
    "layers": ("{name: qformer, layers: 100000}", "qformer: its options ask for more than 8,000"),
    "width": ("{name: qformer, width: 10000000}", "more than 200,000,000,000 parameters"),
    "queries": ("{name: resampler, side: 10000000}", "more than 200,000,000,000 parameters"),
}
RECIPES = {
    "digits": (f"seed: {LONG}\n", "digits"),
    "brackets": ("seed: " + "[" * DEEP + "]" * DEEP + "\n", "nest"),
    "bomb": (BOMB, ""),
    "zero byte": ("seed: \0\n", "no text"),
    "a number": ("5.5\n", "mine.yaml"),
    "a list": ("[1, 2]\n", "is not a mapping of keys"),
    "many keys": ("".join(f"a{n}: 1\n" for n in range(40_000)), "at most 262 kB"),
    "python": ("seed: !!python/object/apply:os.system [touch ran]\n", "python/object"),
}
CONFIGS = {
    "layers": ("num_hidden_layers", 10**7),
    "width": ("hidden_size", 10**9),
    "mlp": ("intermediate_size", 10**12),
    "heads": ("num_attention_heads", 10**7),
    "vocabulary": ("vocab_size", 10**11),
    "none": ("num_hidden_layers", 0),
    "negative": ("num_attention_heads", -1),
}
PATTERNS = {
    "nested": ("(a+)+$", "several ways"),
    "nested in a group": (r"(?:\w+\s?)+!", "several ways"),
    "alternatives": ("(a|aa)+$", "several ways"),
    "alternatives of two cases": ("(?i:(?:a|A)*)b", "several ways"),
    "a limited number": ("(?:a?){40}a{40}", "several ways"),
    "a look ahead": ("(?=(a*)*b)", "several ways"),
    "many open ones": ("a*a*a*b", "more than 2 open"),
    "many optional ones": ("a?" * 30 + "a" * 30, "more than 8"),
    "a reference": (r"(a*)\1b", "not read"),
    "a call": (r"(?<x>a|b\g<x>c)", "not read"),
    "hidden in a set": ("[[](a+)+]", "in a set"),
    "a product": ("(?:a{100}){100}", "10,000 times"),
    "long": ("x" * 5_000, "5,000 characters"),
    "deep": ("(" * 100 + "a" + ")" * 100, "50 deep"),
    "no text": (5, "no text"),
}
PUBLISHED_PATTERNS = {
    "GPT-2": r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    "Llama 3, Qwen": r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"""
    r""" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    "o200k": r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"""
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+""",
    "DeepSeek": r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?"""
    r"""[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    "BLOOM": " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+",
    "CLIP": r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    "digits from the right": r"(?=(\d{3})+(?!\d))",
    "Kimi": r"[\p{Han}]+|[^\r\n\p{L}]?[\p{Lu}\p{Lt}&&[^\p{Han}]]*[\p{Ll}&&[^\p{Han}]]+",
    "T5": r" {2,}",
    "line ends": r"(?:\r\n|\n)+",
}
RECORDS = {
    "digits": '[{"id": ' + LONG + "}]",
    "brackets": "[" * DEEP + "]" * DEEP,
    "objects": '{"a":' * DEEP + "1" + "}" * DEEP,
}


@pytest.mark.parametrize("name", TYPED)
def test_a_typed_value(name: str, tmp_path: Path) -> None:
    word, expected = TYPED[name]
    line = run_command([*FIT, word], tmp_path).assert_one_line()
    assert expected in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", CONNECTORS)
def test_sizes_of_a_connector(name: str, tmp_path: Path) -> None:
    word, expected = CONNECTORS[name]
    assert expected in run_command([*FIT, f"connector={word}"], tmp_path).assert_one_line()


@pytest.mark.parametrize(
    "word",
    ["language.weights=http://a/b", "language.weights=a/../b", "init=https://a/b", "init=a/b/.."]
    + ["vision.name=hf-hub:../../x", "vision.name=http://a/b", "connector={name: ../x}"],
)
def test_a_name_that_is_no_repository(word: str, tmp_path: Path) -> None:
    line = run_command(
        [*FIT, word], tmp_path, environment={"HF_HUB_OFFLINE": "1"}
    ).assert_one_line()
    assert word.split("=")[0] in line


ADDED_TOKENS = {
    "digits": ("added_tokens.json", {"<x>": LONG}, "at most 12 digits"),
    "many": ("added_tokens.json", {f"<{n}>": 1000 + n for n in range(30_000)}, "at most 20,000"),
    "special": (
        "special_tokens_map.json",
        {"additional_special_tokens": [f"<{n}>" for n in range(100_000)]},
        "at most 20,000",
    ),
}


@pytest.mark.parametrize("name", ADDED_TOKENS)
def test_added_tokens(name: str, tmp_path: Path) -> None:
    file, value, expected = ADDED_TOKENS[name]
    shutil.copytree(TINY_LANGUAGE_FOLDER, tmp_path / "model")
    (tmp_path / "model" / file).write_text(json.dumps(value))
    line = run_command([*FIT, "language.weights=model"], tmp_path).assert_one_line()
    assert expected in line


def test_a_vocabulary_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_limits, "MAX_VOCABULARY", 100)
    said = {"model": {"vocab": dict.fromkeys(map(str, range(101)), 0)}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match="101 entries"):
        load_library_tokenizer(tmp_path)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_of_a_tokenizer_that_would_hang(name: str, tmp_path: Path) -> None:
    pattern, expected = PATTERNS[name]
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    said = {"model": {"vocab": {}}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split]}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match=r"tokenizer\.json: its pattern ") as caught:
        load_library_tokenizer(tmp_path)
    assert expected in str(caught.value) and len(caught.value.lines) == 1


@pytest.mark.parametrize("name", PUBLISHED_PATTERNS)
def test_the_patterns_of_published_tokenizers_are_read(name: str) -> None:
    assert pattern_refusal(PUBLISHED_PATTERNS[name]) == ""


def test_a_pattern_that_hangs_is_refused_before_anything_is_encoded(tmp_path: Path) -> None:
    """As the tokenizer of a language model, and of a release whose texts are ordinary."""
    shutil.copytree(TINY_LANGUAGE_FOLDER, tmp_path / "model")
    (tmp_path / "model/tokenizer.model").unlink()
    split = {"type": "Split", "pattern": {"Regex": "([a-z ]+)+!"}, "behavior": "Isolated"}
    model = {"type": "WordLevel", "vocab": {"a": 0, "</s>": 1}, "unk_token": "a"}
    said = {"version": "1.0", "model": model, "added_tokens": []}
    said |= {"pre_tokenizer": {**split, "invert": False}}
    (tmp_path / "model/tokenizer.json").write_text(json.dumps(said))
    line = run_command([*FIT, "language.weights=model"], tmp_path).assert_one_line()
    assert "its pattern '([a-z ]+)+!' repeats what can itself match" in line


def test_replacements_that_let_a_text_grow(tmp_path: Path) -> None:
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    said = {
        "model": {"vocab": {}},
        "normalizer": {"type": "Sequence", "normalizers": [double] * 40},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match="1,099,511,627,776 times as long"):
        load_library_tokenizer(tmp_path)
    said = {"normalizer": {"normalizers": [{"pattern": {"Regex": "a"}}] * 65}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match="65 patterns"):
        load_library_tokenizer(tmp_path)


GRIDS = {
    "rows": (["seeds=1", f"grid={'|'.join(f'seed{n}=1' for n in range(20_000))}"], "20,000 rows"),
    "a file of rows": (["grid=rows.yaml"], "at most 262 kB"),
    "seeds": (["seeds=1000000"], "allowed are 1 to 1000"),
    "digits of seeds": ([f"seeds={LONG}"], "allowed are 1 to 1000"),
    "a list of seeds": ([f"seeds={list(range(2_000))}".replace(" ", "")], "allowed are 1 to 1000"),
    "rates": (["sweep=" + ",".join(f"1.{n}" for n in range(1, 999))], "2 to 30 of them"),
}


@pytest.mark.parametrize("name", GRIDS)
def test_a_comparison_without_end(name: str, tmp_path: Path) -> None:
    words, expected = GRIDS[name]
    rows = "".join(f"  - {{seed: {number}}}\n" for number in range(30_000))
    (tmp_path / "rows.yaml").write_text(f"rows:\n{rows}")
    words = ["compare", "recipe=yivl_llava", "dry_run=true", *words]
    line = run_command(words, tmp_path).assert_one_line()
    assert expected in line and len(line) < 1_000


def test_a_dry_run_tries_a_part_of_a_step_without_end(tmp_path: Path) -> None:
    words = ["only=chat", "stages.chat.image_size=56", "data.workers=0"]
    words += ["stages.chat.global_batch_size=1000000", "stages.chat.steps=1000000000"]

    def prepare() -> None:
        dry_run.MAX_TRIED_SAMPLES["cpu"] = 4

    outcome = run_command([*FIT, *words], tmp_path, timeout=60, prepare=prepare)
    assert outcome.code == 0 and not outcome.killed, outcome.words
    assert "which is 4e-06 of a step" in outcome.stdout


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe(name: str, tmp_path: Path) -> None:
    text, expected = RECIPES[name]
    (tmp_path / "mine.yaml").write_text(text)
    line = run_command(["show", "recipe=mine.yaml"], tmp_path).assert_one_line()
    assert "mine.yaml" in line and expected in line
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_of_a_language_model(name: str, tmp_path: Path) -> None:
    key, value = CONFIGS[name]
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    config |= {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "vocab_size": 100, key: value}
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    outcome = run_command([*FIT, "language.weights=model"], tmp_path)
    line = outcome.assert_one_line()
    assert key.removeprefix("num_").replace("_", " ") in line.replace("_", " ")


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("file", ["data.json", "data.jsonl"])
def test_records(name: str, file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(RECORDS[name])
    words = [*FIT, f"data.train={file}", "data.images=."]
    assert file in run_command(words, tmp_path).assert_one_line()


@pytest.mark.parametrize("samples", [10**15, -1, 0.5, "many", True, None])
def test_a_list_of_shards(samples: object, tmp_path: Path) -> None:
    shards = [{"file": "0.tar", "samples": samples}]
    (tmp_path / "shards.json").write_text(json.dumps({"shards": shards}))
    line = run_command([*FIT, "data.train=."], tmp_path).assert_one_line()
    assert "shards.json" in line


@pytest.mark.parametrize("name", RECORDS)
def test_answers(name: str, tmp_path: Path) -> None:
    (tmp_path / "answers.json").write_text(RECORDS[name])
    words = ["score", "task=mmmu", "answers=answers.json", "protocol=official"]
    assert "answers.json" in run_command(words, tmp_path).assert_one_line()


def test_values_that_are_nested_deeply() -> None:
    deep = json.loads("[" * 700 + "5" + "]" * 700)
    assert _flatten_records(deep) == [" is not a JSON object"]
    record = {"id": "a", "x": deep, "conversations": [{"from": "human", "value": "a"}]}
    with pytest.raises(BadSample, match="nested too deeply"):
        sample_from_record(record, "a", lambda name: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 200_000)
