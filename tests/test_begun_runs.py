"""What becomes of a comparison whose files, rows or folders change while it runs or rests."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from fake_training import FakeTraining, training
from test_connector_registry import MINE

from vlbench.__main__ import main
from vlbench.compare.experiment import cost_estimate
from vlbench.compare.experiment.grid import parse_grid
from vlbench.config import recipe as recipes

__all__ = ["training"]  # a fixture
STEPS = "grid=stages.chat.steps=5 | stages.chat.steps=6"


def compare(*words: str) -> int:
    return main(["compare", "run=c", "jobs=1", *words])


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def edit_after(training: FakeTraining, count: int, file: Path, old: str, new: str) -> None:
    """Edit a file when `count` runs have been trained."""

    def edit_once(_: Path) -> None:
        if len(training.trained) == count:
            edit(file, old, new)

    training.after_run = edit_once


def own_recipe(tmp_path: Path) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(recipes.recipe_to_yaml(recipes.load_recipe(["recipe=yivl_llava"])))
    edit(file, "recipe: yivl_llava", "recipe: null")
    return file


def own_connector(tmp_path: Path) -> Path:
    (tmp_path / "connectors").mkdir()
    file = tmp_path / "connectors/own.py"
    file.write_text(MINE)
    return file


def test_a_recipe_that_is_edited_meanwhile_ends_what_is_not_begun(
    training: FakeTraining, tmp_path, capsys
):
    file = own_recipe(tmp_path)
    words = ["recipe=mine.yaml", "seeds=2", STEPS]
    edit_after(training, 2, file, "warmup_ratio: 0.03", "warmup_ratio: 0.05")
    before = file.read_text()
    assert compare(*words) == 1
    said = capsys.readouterr()
    assert len(training.trained) == 2 and "differs in stages." in said.err
    assert "2 runs failed or did not finish" in said.out
    assert (tmp_path / "c/report.md").is_file()
    file.write_text(before)
    assert compare(*words) == 0 and len(training.trained) == 4


def test_seeds_are_not_added_with_an_edited_connector(training: FakeTraining, tmp_path, capsys):
    file = own_connector(tmp_path)
    words = ["recipe=yivl_llava", "connector.name=own", STEPS]
    assert compare(*words, "seeds=1") == 0
    edit(file, "bias=bias)", "bias=bias)  # another initialisation")
    assert compare(*words, "seeds=2") == 2
    told = capsys.readouterr()
    assert "own.py" in told.err and "Put the kept file back" in told.err
    assert len(training.trained) == 2


def test_a_row_whose_connector_is_edited_gets_no_further_seeds(
    training: FakeTraining, tmp_path, capsys
):
    file = own_connector(tmp_path)
    words = ["recipe=yivl_llava", "connector.name=own", STEPS]
    edit_after(training, 1, file, "bias=bias)", "bias=bias)  # edited")
    assert compare(*words, "seeds=2") == 1
    said = capsys.readouterr()
    assert "as in" not in said.out  # the later row would have half of its stages from the former
    assert [str(one) for one in training.trained] == [
        "c/chat.steps=5/seed0",
        "c/chat.steps=6/seed0",
        "c/chat.steps=6/seed1",
    ]
    assert "chat.steps=5, seed 1: failed: c/chat.steps=5/seed0 was" in said.err


def test_a_row_whose_data_are_edited_gets_no_further_seeds(
    training: FakeTraining, tmp_path, capsys
):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    file = tmp_path / "data.json"
    file.write_text(json.dumps([{"id": "1", "image": "red.png", "conversations": turns}]))
    words = ["recipe=yivl_llava", "data.train=data.json", "data.images=.", STEPS]
    assert compare(*words, "seeds=1") == 0
    os.utime(file, (1, 1))  # another time alone is no other data
    assert compare(*words, "seeds=2") == 0 and len(training.trained) == 4
    edit(file, "Red.", "Blue.")
    assert compare(*words, "seeds=3") == 1 and len(training.trained) == 4
    said = capsys.readouterr()
    assert "data.json holds other data than when c/chat.steps=5/seed0 began" in said.err
    assert "seeds: 0, 1;" in said.out


def test_a_run_that_is_moved_away_does_not_end_the_others(training: FakeTraining, tmp_path, capsys):
    def move(folder: Path) -> None:
        if folder.parts[-2:] == ("chat.steps=5", "seed1"):
            shutil.move(folder, tmp_path / "elsewhere")

    training.after_run = move
    assert compare("recipe=yivl_llava", "seeds=3", STEPS) == 1
    said = capsys.readouterr()
    assert len(training.trained) == 6 and "it was moved or deleted" in said.err
    assert "seeds: 0, 2;" in (tmp_path / "c/report.md").read_text()


def test_rows_that_a_further_row_would_rename_are_not_trained_again(
    training: FakeTraining, tmp_path, capsys
):
    first = "stages.chat.steps=5 + connector.depth=2 | stages.chat.steps=6 + connector.depth=2"
    assert compare("recipe=yivl_llava", "seeds=1", f"grid={first}") == 0
    more = f"{first} | stages.chat.steps=5 + connector.depth=1"
    words = ["recipe=yivl_llava", "seeds=1", f"grid={more}"]
    assert compare(*words) == 2
    (told,) = capsys.readouterr().err.splitlines()
    old, new = told.split("Rename ")[1].split(", so that")[0].split(" to ")
    assert len(training.trained) == 2
    for row in parse_grid([*words, "run=c"]).rows[:2]:
        Path("c", row.name.replace("_connector.depth=2", "")).rename(f"c/{row.name}")
    assert Path(new).is_dir() and not Path(old).exists()
    assert compare(*words) == 0 and len(training.trained) == 3


def test_a_report_says_that_seeds_were_added_after_others(training: FakeTraining, tmp_path):
    def looks() -> tuple[list[int], bool]:
        report = json.loads((tmp_path / "c/report.json").read_text())
        return report["looks"], any("Seeds were added" in note for note in report["notes"])

    words = ["recipe=yivl_llava", STEPS]
    for seeds, expected in ((2, [2]), (3, [2, 3]), (3, [2, 3]), (4, [2, 3, 4]), (1, [1])):
        assert compare(*words, f"seeds={seeds}") == 0
        assert looks() == (expected, len(expected) > 1)
    (tmp_path / "c/report.json").write_text('{"seeds": 3, "looks": ["x", 1, true]}')
    assert compare(*words, "seeds=2") == 0 and looks() == ([1, 2], True)


def test_rows_without_a_common_seed_are_explained_by_the_runs_that_failed(
    training: FakeTraining, tmp_path, capsys
):
    for row, seed in ((5, 0), (6, 1)):  # folders with other things are no runs
        (tmp_path / f"c/chat.steps={row}/seed{seed}").mkdir(parents=True)
        (tmp_path / f"c/chat.steps={row}/seed{seed}/mine.txt").write_text("mine")
    (tmp_path / "c/command.txt").write_text("python -m vlbench compare\n")
    assert compare("recipe=yivl_llava", "seeds=2", STEPS) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert "no seed is common" in told and "2 runs failed, the first: c/chat.steps=5/seed0" in told


def test_recipes_are_read_a_few_times_for_a_row_however_many_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = 12
    alternatives = " | ".join(f"stages.align_224.steps={steps}" for steps in range(5, 5 + rows))
    grid = parse_grid(["recipe=yivl_llava", f"grid={alternatives}", "run=c", "dry_run=true"])
    read = []
    real = recipes.load_recipe
    monkeypatch.setattr(recipes, "load_recipe", lambda *words: read.append(1) or real(*words))
    monkeypatch.setattr(cost_estimate, "_probe_run", lambda *_: None)
    cost_estimate.print_plan(grid)
    assert len(read) <= 5 * rows
