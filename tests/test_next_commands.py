"""What `fit` prints to try next are commands that are understood."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from vlbench.command_line.declarations import DECLARATIONS
from vlbench.command_line.parser import parse_arguments
from vlbench.train.run_folder import RunFolder
from vlbench.train.run_report import show_results


def test_next_commands_are_understood(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "a run"
    (folder / "checkpoints/0-chat-000001").mkdir(parents=True)
    (folder / "checkpoints/0-chat-000001/position.json").write_text("{}")
    (folder / "results.json").write_text(json.dumps({"accuracy": 0.5, "questions": 2}))
    assert show_results(RunFolder(folder)) == 0
    _, _, told = capsys.readouterr().out.partition("next:\n")
    commands = [shlex.split(line, comments=True) for line in told.splitlines()]
    verbs = {}
    for words in commands:
        if words[:3] == ["python", "-m", "vlbench"]:
            verbs[words[3]] = words[4:]
            declaration = DECLARATIONS.get(words[3])
            if declaration is not None:
                parse_arguments(declaration, words[4:])
    assert verbs["chat"] == verbs["serve"] == [f"model={folder}"]


def test_what_a_run_does_not_hold_is_not_suggested(tmp_path: Path, capsys) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"accuracy": 0.5, "questions": 2}))
    assert show_results(RunFolder(tmp_path)) == 0
    told = capsys.readouterr().out.partition("next:\n")[2]
    assert told == "  python -m vlbench show recipe=yivl_llava size=6b\n"
    (tmp_path / "tensorboard").mkdir()
    assert show_results(RunFolder(tmp_path)) == 0
    assert f"  tensorboard --logdir {tmp_path}\n" in capsys.readouterr().out
