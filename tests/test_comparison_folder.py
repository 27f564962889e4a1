"""`compare run=DIR`: in which folders a comparison may write, and that nothing else is touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlbench.__main__ import main
from vlbench.compare.experiment import cost_estimate
from vlbench.compare.experiment.comparison_folder import check_comparison_folder
from vlbench.errors import UserError

COMMAND = "python -m vlbench compare recipe=yivl_llava run=c\n"
RUN = ("recipe.yaml", "results.json", "checkpoints/0-chat-000002/recipe.yaml")


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    return folder


def run_of(row: str) -> list[str]:
    return [f"{row}/{name}" for name in RUN]


@pytest.mark.parametrize(
    "names",
    [
        ["notes.txt"],
        ["report.md"],  # nothing says that it is a comparison's
        ["plan.json", "src/main.py"],
        ["command.txt", *run_of("linear/seed0")],  # of another program
        [*run_of("linear/seed0"), "notes.txt"],
        [*run_of("linear/seed0"), "src/main.py"],
        [".git/config"],
        ["linear/seed0/mine.txt"],
    ],
)
def test_a_folder_with_other_things_is_left_as_it_is(names, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(fill(tmp_path, *names))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for words in ([], ["dry_run=true"], ["jobs=slurm"]):
        assert main(["compare", "recipe=yivl_llava", "seeds=1", "run=.", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "run=. is a folder with other things in it (" in line and "name a new one" in line
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    "names",
    [
        [],
        [".lock", ".command.txt.0123"],  # killed while it began
        run_of("linear/seed0"),
        [*run_of("linear/seed0"), "linear/seed0.log", "report.md", "plan.json", "array.sh"],
        [*run_of("curve/64/seed0"), *run_of("sweep/linear/x1"), "features/a", "slurm-1.log"],
    ],
)
def test_a_comparison_without_a_command_is_one_by_what_it_holds(names, tmp_path):
    check_comparison_folder(fill(tmp_path, *names))


def test_a_comparison_is_known_by_its_command(tmp_path):
    check_comparison_folder(tmp_path / "new")
    fill(tmp_path, "notes.txt", "src/main.py")
    with pytest.raises(UserError, match=r"notes\.txt, src"):
        check_comparison_folder(tmp_path)
    (tmp_path / "command.txt").write_text(COMMAND)
    check_comparison_folder(tmp_path)


def test_a_plan_of_another_program_is_passed_over(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "c", "command.txt")
    (tmp_path / "c/command.txt").write_text(COMMAND)
    (tmp_path / "c/plan.json").write_text(json.dumps({"yivl_llava": "x", "b": {"words": 3}}))
    monkeypatch.setattr(cost_estimate, "_probe_run", lambda *_: None)
    assert main(["compare", "recipe=yivl_llava", "seeds=1", "run=c", "dry_run=true"]) == 0
    assert "1 rows x 1 seeds" in capsys.readouterr().out
