"""The README's commands exist, and its connector trains."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vlbench.__main__ import main
from vlbench.command_line.declarations import DECLARATIONS
from vlbench.command_line.parser import parse_arguments
from vlbench.config import recipe as recipes
from vlbench.verbs import VERBS

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (?:.*&& )?python -m vlbench (.*)$", README, re.MULTILINE)


def test_the_readme_has_commands() -> None:
    assert "fit recipe=yivl_llava" in COMMANDS and len(COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command: str) -> None:
    verb, *words = shlex.split(command)
    assert verb in VERBS
    declaration = DECLARATIONS.get(verb)
    if declaration and not VERBS[verb].takes_recipe_keys:
        parse_arguments(declaration, words)
    if verb in ("fit", "show") and "connector.name=mine" not in words:
        recipes.load_recipe(words)


def test_its_lines_of_python_run(tmp_path: Path) -> None:
    lines = re.findall(r"^    python (-c .*)$", README, re.MULTILINE)
    assert lines
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    for line in lines:
        subprocess.run(
            [sys.executable, *shlex.split(line)], cwd=tmp_path, env=environment, check=True
        )
    assert (tmp_path / "scene.png").is_file()


def test_the_connector_of_the_readme_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    block = re.search(r"\n\n((?:    .*\n|\n)*    class Mine(?:.*\n)*?)\n\w", README)
    assert block
    source = "\n".join(line[4:] for line in block.group(1).splitlines())
    (tmp_path / "connectors").mkdir()
    (tmp_path / "connectors" / "mine.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    words = ["connector.name=mine", "connector.bias=false", "dry_run=true"]
    assert main(["fit", "recipe=yivl_llava", *words, "stages.chat.global_batch_size=2"]) == 0
    assert "dry run done" in capsys.readouterr().out
