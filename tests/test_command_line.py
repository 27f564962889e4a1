"""What verbs take: types, ranges, old words, nearest names, all mistakes at once."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from vlbench.__main__ import main
from vlbench.command_line import arguments
from vlbench.command_line.arguments import (
    ChatArguments,
    EvalArguments,
    ListArguments,
    PlanArguments,
    ScoreArguments,
    ServeArguments,
)
from vlbench.command_line.compare_arguments import (
    ReportArguments,
)
from vlbench.command_line.parser import parse_arguments, split_arguments
from vlbench.data.chat_template import CHAT_TEMPLATES
from vlbench.errors import UserError
from vlbench.evaluate.tasks.benchmark_tasks import EVAL_PROTOCOLS, RECORD_READERS
from vlbench.evaluate.tasks.scoring_protocols import SCORING_PROTOCOLS
from vlbench.listing import LISTED_KINDS
from vlbench.load_model import DTYPE_NAMES
from vlbench.serve.model_card import USAGE_TEXTS

OLD_WORDS = {
    "eval run=RUN": "eval has no key 'run'; its keys are model, ",
    "chat run=RUN": "chat has no key 'run'; its keys are model, ",
    "export run=RUN out=DIR format=yi_vl": "export has no key 'run'; its keys are model, ",
    "export model=RUN to=DIR format=yi_vl": "export has no key 'to'; its keys are model, out, ",
    "pack data=FILE.json to=DIR": "pack has no key 'to'; its keys are data, images, out, ",
    "report RUN to=FILE.md": "report has no key 'to'; its keys are RUN..., votes, out.",
    "check recipe=yivl_llava to=DIR": "'to=DIR' is no key of check or of a recipe.",
    "compare recipe=yivl_llava out=DIR": "'out=DIR' is no key of compare or of a recipe.",
}


@pytest.mark.parametrize(("words", "message"), OLD_WORDS.items())
def test_an_old_word_is_refused_with_the_right_one(words, message, capsys):
    assert main(words.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"vlbench: {message}")
    verb = words.split()[0]
    right = "run" if verb == "compare" else "model" if "run=" in words else "out"
    assert lines[0].endswith(f" Did you mean '{right}'?")


def test_values_have_the_declared_types() -> None:
    words = ["model=a", "image=b.png", "image=c.png", "temperature=1e-1", "seed=7", "compiled=true"]
    parsed = parse_arguments(ChatArguments, words)
    assert parsed == ChatArguments(
        model="a", image=("b.png", "c.png"), temperature=0.1, seed=7, compiled=True
    )
    assert parsed.max_new_tokens == 512 and parsed.dtype is None


def test_the_names_are_those_of_the_tables_behind_them() -> None:
    assert get_args(arguments.TemplateName) == ("auto", *CHAT_TEMPLATES)
    assert get_args(arguments.DtypeName) == tuple(DTYPE_NAMES)
    assert get_args(arguments.BenchmarkName) == tuple(RECORD_READERS) == tuple(SCORING_PROTOCOLS)
    assert get_args(arguments.ProtocolName) == tuple(EVAL_PROTOCOLS)
    for protocols in SCORING_PROTOCOLS.values():
        assert set(get_args(arguments.ProtocolName)) == set(protocols)
    assert get_args(arguments.ExportFormat) == tuple(USAGE_TEXTS)
    assert get_args(arguments.ListedKind) == tuple(LISTED_KINDS)


def test_text_is_taken_as_it_is() -> None:
    parsed = parse_arguments(ChatArguments, ["model=007", "question=what is ${a}=null?"])
    assert (parsed.model, parsed.question) == ("007", "what is ${a}=null?")


def test_a_path_may_begin_with_the_home_folder(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    parsed = parse_arguments(ReportArguments, ["~/a", "b=c/seed0", "out=~/r.md"])
    assert parsed.runs == ("/home/me/a", "b=c/seed0")
    assert parsed.out == ("/home/me/r.md",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["batch=0"], "batch must be at least 1, given 0"),
        (["batch=1.5"], "batch must be a whole number, given 1.5"),
        (["batch=5000"], "batch must be at most 4096, given 5000"),
        (["blank=yes"], "blank must be true or false, given 'yes'"),
        (["protocol=offical"], "protocol must be one of yi, official, .*Did you mean 'official'"),
        (["data="], "data has no value; write data=VALUE, or leave it out"),
        (["split=a", "split=b"], "split is given twice, as 'a' and 'b'"),
        (["limt=3"], "eval has no key 'limt'; .* Did you mean 'limit'"),
        (["three"], "eval takes no word 'three'; its keys are model, "),
    ],
)
def test_mistakes_say_what_is_allowed(words, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_arguments(EvalArguments, ["model=a", *words])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("declaration", "words", "meant"),
    [
        (ServeArguments, ["runs/a"], "Did you mean model=runs/a[?]"),
        (ServeArguments, ["my run"], "Did you mean 'model=my run'[?]"),
        (ScoreArguments, ["a.jsonl"], "Did you mean answers=a.jsonl[?]"),  # `a.jsonl` is no task
        (ScoreArguments, ["mmmu", "answers=a"], "Did you mean task=mmmu[?]"),
    ],
)
def test_a_value_without_its_key_is_that_of_the_key_that_is_needed(declaration, words, meant):
    with pytest.raises(UserError, match=meant):
        parse_arguments(declaration, words)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        parse_arguments(EvalArguments, ["run=a", "batch=0", "blank=1", "seed=-1"])
    assert len(str(caught.value).splitlines()) == 4


def test_the_words_of_a_recipe_are_left_as_they_are() -> None:
    words = ["recipe=yivl_llava", "mfu=0.5", "stages.chat.steps=2", "connector.gpu=1", "only=chat"]
    keys = ("recipe", "stages", "connector", "only")
    parsed, recipe_words = split_arguments(PlanArguments, words, keys)
    assert parsed == PlanArguments(mfu=0.5)
    assert recipe_words == ["recipe=yivl_llava", "stages.chat.steps=2", *words[3:]]


def test_words_without_a_key_are_checked_like_others() -> None:
    assert parse_arguments(ListArguments, ["sizes", "encoders"]).kinds == ("sizes", "encoders")
    with pytest.raises(UserError, match="Did you mean 'sizes'"):
        parse_arguments(ListArguments, ["size"])


def test_the_name_of_a_folder_may_hold_an_equals_sign(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "lora.rank=4"
    assert main(["report", str(folder)]) == 2
    assert f"{folder} is no run folder" in capsys.readouterr().err
