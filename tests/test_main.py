"""The verbs: help, listing, exit codes, and what is (not) imported for them."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import pkgutil
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vlbench import __version__
from vlbench.__main__ import main
from vlbench.command_line.declarations import DECLARATIONS
from vlbench.command_line.parser import declared_arguments, parse_arguments, split_arguments
from vlbench.config import key_table
from vlbench.config.recipe import load_recipe
from vlbench.errors import BadSample, EnvironmentFailure, UserError, suggest_name
from vlbench.garbage_collection import pause_garbage_collection
from vlbench.program_help import HELP_FLAGS, program_help
from vlbench.verbs import VERBS, recipe_key_names

ROOT = Path(__file__).parents[1]
QUICK = [
    [],
    ["--help"],
    ["--version"],
    ["list"],
    ["show", "recipe=yivl_llava"],
    ["fit", "recipe=yivl_llav"],
    ["fit", "recipe=yivl_llava", "connector.detph=1"],
    ["fit", "recipe=yivl_llava", "size=34b"],
    ["score", "task=mmmu", "answers=none", "protocol=official"],
    ["plan", "recipe=yivl_llava", "gpu=a801"],
    ["chatt"],
]
NEEDLESS = set(
    "torch torchvision transformers lightning open_clip timm peft pyarrow sklearn scipy pandas "
    "matplotlib huggingface_hub".split()
)
"""Libraries that are not imported to look at something."""


def python(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a Python program in `folder` with this checkout on its path."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("words", QUICK, ids=" ".join)
def test_what_only_looks_imports_no_large_library(words, tmp_path):
    mistaken = not words or words[0] in ("chatt", "score", "fit", "plan")
    assert codes_without_large_libraries([words], tmp_path) == [2 if mistaken else 0]


def test_the_help_of_verbs_imports_no_large_library(tmp_path):
    words = [[verb, "--help"] for verb in VERBS]
    assert codes_without_large_libraries(words, tmp_path) == [0] * len(VERBS)


def codes_without_large_libraries(commands: list[list[str]], folder: Path) -> list[int]:
    """Return the exit codes of commands that one process runs; it must not import NEEDLESS."""
    done = python(
        "import sys; from vlbench.__main__ import main\n"
        f"codes = [main(words) for words in {commands}]\n"
        f"imported = {NEEDLESS} & set(sys.modules)\n"
        "assert not imported, imported\n"
        "print(codes)",
        folder,
    )
    assert done.returncode == 0, done.stderr
    codes: list[int] = json.loads(done.stdout.splitlines()[-1])
    return codes


def test_help_names_every_verb_and_every_key(capsys):
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert all(f"\n  {name}" in overview for name in VERBS)
    assert main(["fit", "--help"]) == 0
    table = capsys.readouterr().out
    assert all(row.name in table and row.help in table for row in key_table.key_rows())


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: python -m vlbench {verb} ")
    declaration = DECLARATIONS.get(verb)
    for spec in declared_arguments(declaration).values() if declaration else []:
        assert spec.help in text and f"\n{spec.help_row()[0]} " in text
    if VERBS[verb].takes_recipe_keys:
        assert all(row.help in text for row in key_table.key_rows())


def test_help_of_a_verb_may_be_asked_for_in_both_orders(capsys):
    assert main(["export", "--help"]) == 0
    table = capsys.readouterr().out
    for flag in HELP_FLAGS:
        assert main([flag, "export"]) == 0
        assert capsys.readouterr().out == table
    assert main(["help", "exprot"]) == 2
    assert "Did you mean 'export'?" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_the_example_of_every_verb_is_understood(verb):
    words = shlex.split(VERBS[verb].example)
    declaration, recipe_words = DECLARATIONS.get(verb), words
    if declaration and VERBS[verb].takes_recipe_keys:
        _, recipe_words = split_arguments(declaration, words, recipe_key_names())
    elif declaration:
        parse_arguments(declaration, words)
    if VERBS[verb].takes_recipe_keys and verb not in ("compare", "graft"):
        load_recipe(recipe_words)


@pytest.mark.parametrize("flag", HELP_FLAGS)
def test_the_help_of_the_program_imports_nothing_else(flag, tmp_path):
    done = python(
        "import sys; from vlbench.__main__ import run_program\n"
        f"before, sys.argv[1:] = set(sys.modules), [{flag!r}]\n"
        "assert run_program() == 0\n"
        "assert not set(sys.modules) - before and not {'pydantic', 'logging'} & before",
        tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{program_help()}\n"


def test_no_garbage_is_collected_while_torch_is_imported(tmp_path):
    done = python(
        "import gc, sys; from vlbench.__main__ import main\n"
        "def note(phase, info):\n"
        "    torch = sys.modules.get('torch')\n"
        "    collected.append(torch and torch.__spec__._initializing)\n"
        "collected = []; gc.callbacks.append(note)\n"
        "assert main(['pack', 'data=none.json', 'out=shards']) == 2\n"
        "assert 'torch' in sys.modules and collected and not any(collected) and gc.isenabled()",
        tmp_path,
    )
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr


def test_a_pause_of_garbage_collection_leaves_it_as_it_was():
    assert gc.isenabled()
    with pause_garbage_collection(), pause_garbage_collection():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with pause_garbage_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_list_names_what_there_is(capsys):
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("yivl_llava", "tiny", "34b", "depth: int = 2", "EVA02-L"))
    assert main(["list", "encoders"]) == 0
    assert "ViT-H-14" in capsys.readouterr().out.splitlines()
    assert main(["list", "encoder"]) == 2
    assert "Did you mean 'encoders'?" in capsys.readouterr().err


def test_list_survives_a_broken_connector(tmp_path, monkeypatch, capsys):
    (tmp_path / "connectors").mkdir()
    (tmp_path / "connectors" / "broken.py").write_text("class A(:")
    monkeypatch.chdir(tmp_path)
    assert main(["list", "connectors"]) == 0
    text = capsys.readouterr().out
    assert "cannot be used" in text and "llava_mlp" in text
    assert main(["list", "connectors", "size=tiny"]) == 0
    told = capsys.readouterr()
    assert "llava_mlp" in told.out and "broken cannot be used" in told.err
    assert "broken.py, line 1" in told.err


def test_a_mistake_is_one_line_each_and_exit_code_2(capsys):
    assert main(["show", "recipe=yivl_llava", "sede=1", "size=7b"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 2
    assert all(line.startswith("vlbench: ") for line in err.splitlines())


def test_an_unknown_verb_and_no_verb(capsys):
    assert main(["fti"]) == 2
    assert "Did you mean 'fit'?" in capsys.readouterr().err
    assert main([]) == 2


def test_interrupts_and_failures(monkeypatch, capsys):
    def raising(error: BaseException) -> None:
        def call(words: list[str]) -> int:
            raise error

        monkeypatch.setitem(VERBS, "fit", VERBS["fit"]._replace(run_verb=call))

    raising(KeyboardInterrupt())
    assert main(["fit"]) == 130
    raising(BadSample("a", "is broken"))
    assert main(["fit"]) == 2
    assert "vlbench: sample a: is broken" in capsys.readouterr().err
    raising(EnvironmentFailure("out of memory"))
    assert main(["fit"]) == 1
    assert capsys.readouterr().err == "vlbench: out of memory\n"
    raising(RuntimeError("a bug"))
    with pytest.raises(RuntimeError):
        main(["fit"])


@pytest.mark.parametrize("words", ["fit --help", "--help"])
def test_a_reader_that_leaves_is_no_error(words, tmp_path):
    command = f"{sys.executable} -m vlbench {words} | true"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""


def test_nearest():
    assert suggest_name("langauge", ["language", "vision"]) == " Did you mean 'language'?"
    assert suggest_name("TINY", ["tiny"]) == " Did you mean 'tiny'?"
    assert suggest_name("zzz", ["language"]) == ""
    assert (
        suggest_name("batch", ["global_batch_size", "catch"])
        == " Did you mean 'global_batch_size'?"
    )
    assert suggest_name("of", ["share_of_tokens", "share_of_images"]) == ""  # two have the word
    assert isinstance(BadSample("a", "b"), UserError)


def test_version_is_that_of_the_project(capsys):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in project["project"]["dynamic"]
    source = project["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert pkgutil.resolve_name(source) == __version__
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vlbench {__version__}\n"


def test_every_package_and_data_file_is_declared():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    declared = set(settings["tool"]["setuptools"]["packages"])
    there = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in ROOT.glob("vlbench/**/__init__.py")
    }
    assert declared == there | {"vlbench.connectors", "vlbench.recipes"}
    folders = settings["tool"]["setuptools"]["package-dir"]
    roots = {name: ROOT / folders.get(name, name.replace(".", "/")) for name in declared}
    data = {
        path
        for root in roots.values()
        for path in root.rglob("*")
        if path.suffix not in (".py", ".pyc", "")
    }
    matched = {
        path
        for package, patterns in settings["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
        for path in roots[package].glob(pattern)
    }
    assert data == matched & data


def test_installed_versions_are_within_the_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for line in project["dependencies"]:
        name, _, bound = line.partition(">=")
        have = importlib.metadata.version(name).split("+")[0].split(".")
        assert [int(part) for part in have[:2]] >= [int(part) for part in bound.split(".")[:2]], (
            line
        )


def test_the_cost_of_connectors_is_counted_at_a_real_size(capsys):
    assert main(["list", "connectors", "size=6b"]) == 0
    table = {row.split()[0]: row.split()[1:] for row in capsys.readouterr().out.splitlines() if row}
    assert table["llava_mlp"][:2] == ["22,044,672", "1024"]
    assert table["flamingo"][1:3] == ["1", "64"] and table["qformer"][1] == "32"
    flops = {name: float(table[name][3]) for name in ("llava_mlp", "qformer", "flamingo")}
    assert flops["flamingo"] < flops["qformer"] < flops["llava_mlp"]
    # two operations per weight and token, of 6.06 billion weights but the embedding's
    assert flops["llava_mlp"] == pytest.approx(2 * 5.8e9 * (1024 + 64) / 1e12, rel=0.05)
    assert main(["list", "connectors", "size=9b"]) == 2
    assert "no size '9b'" in capsys.readouterr().err


def test_a_path_of_a_user_who_does_not_exist_is_one_line(capsys):
    assert main(["score", "answers=~nosuchuser1/answers.jsonl", "task=mmmu", "protocol=yi"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
