"""sweep.json says what runs were trained with: rows that were begun keep the rates chosen then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_report_command import run
from test_run_jobs import finish

from vlbench.__main__ import main
from vlbench.compare.experiment import compare_command, cost_estimate, lr_sweep
from vlbench.compare.experiment.grid import parse_grid
from vlbench.compare.report.sweep_summary import describe_sweep
from vlbench.config import recipe as recipes
from vlbench.errors import UserError

TWO = ["recipe=yivl_llava,yivl_qformer", "seeds=1", "run=c"]
ONE = ["recipe=yivl_llava", *TWO[1:]]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """Return a folder in which a comparison, c, was begun; `compare` trains nothing there."""
    monkeypatch.chdir(tmp_path)
    Path("c").mkdir()
    Path("c/command.txt").write_text("python -m vlbench compare\n")
    monkeypatch.setattr(cost_estimate, "_probe_run", lambda *_: None)
    monkeypatch.setattr(compare_command, "_train_unfinished", lambda *_: {})
    return tmp_path


def try_rates(words: list[str], losses: dict[str, dict[float, str]]) -> None:
    """Finish trials, row -> factor -> loss."""
    grid = parse_grid(words)
    for row in grid.rows:
        for factor, loss in losses.get(row.name, {}).items():
            finish(lr_sweep.trial_folder(grid, row, {"connector": factor}), loss)


def train(words: list[str]) -> None:
    """Finish the runs of a comparison at the rates that its sweep takes, or else its own."""
    grid = parse_grid(words)
    grid.folder.mkdir(exist_ok=True)
    if grid.lr_factors:
        grid = lr_sweep.apply_best_lr(grid)
    for row in grid.rows:
        for seed in grid.seeds:
            if not grid.run_folder(row, seed).exists():
                run(grid.run_folder(row, seed), 0.8, seed, *row.overrides)


def chosen(row: str = "yivl_llava") -> dict[str, float] | None:
    return json.loads(Path("c/sweep.json").read_text())["rows"][row]["chosen"]


def test_a_trial_that_is_better_later_changes_no_run_that_was_begun(home, capsys):
    words = [*ONE, "sweep=1,3"]
    try_rates(words, {"yivl_llava": {1: "0.4"}})  # x 3 failed
    train(words)
    try_rates(words, {"yivl_llava": {3: "0.3"}})  # tried again
    assert main(["compare", *words]) == 0
    kept = (
        "yivl_llava keeps x 1, with which its runs were begun; by now x 3 has a lower held-out "
        "loss (0.3000, not 0.4000). Only a comparison in a new folder, run=DIR, would take it."
    )
    assert chosen() == {"connector": 1.0}
    assert f"  {kept}\n" in capsys.readouterr().out
    report = Path("c/report.md").read_text()
    assert kept in report and "x 1 0.4000, x 3 0.3000: x 1 is taken" in report
    assert "at the edge" not in report  # it was not the best
    assert kept in describe_sweep(Path("c"))


def test_a_widened_or_narrowed_sweep_changes_no_run_that_was_begun(home):
    try_rates([*ONE, "sweep=1,3"], {"yivl_llava": {1: "0.4", 3: "0.5"}})
    train([*ONE, "sweep=1,3"])
    try_rates([*ONE, "sweep=0.1,0.3"], {"yivl_llava": {0.1: "0.6", 0.3: "0.2"}})
    for factors in ("0.1,0.3,1,3", "0.1,0.3"):
        assert main(["compare", *ONE, f"sweep={factors}"]) == 0
        assert chosen() == {"connector": 1.0}
        report = Path("c/report.md").read_text()
        assert "x 1 0.4000, x 3 0.5000, x 0.1 0.6000, x 0.3 0.2000: x 1 is taken" in report
        assert "by now x 0.3 has a lower held-out loss (0.2000, not 0.4000)" in report
    shutil.rmtree("c/yivl_llava")  # nothing was begun: what is best is taken
    assert main(["compare", *ONE, "sweep=0.1,0.3"]) == 0 and chosen() == {"connector": 0.3}


def test_a_row_that_had_no_choice_keeps_its_own_rates(home):
    train([*ONE, "sweep=1,3"])  # both trials failed
    try_rates([*ONE, "sweep=1,3"], {"yivl_llava": {3: "0.3"}})
    assert main(["compare", *ONE, "sweep=1,3"]) == 0 and chosen() is None
    report = Path("c/report.md").read_text()
    assert "yivl_llava keeps the recipe's rates, with which its runs were begun" in report


def test_runs_begun_with_another_seed_keep_their_rates_too(home):
    words = [*ONE, "sweep=1,3"]
    try_rates(words, {"yivl_llava": {1: "0.4"}})
    train(words)
    try_rates(words, {"yivl_llava": {3: "0.3"}})
    (row,) = lr_sweep.apply_best_lr(parse_grid(["seeds=[5]", *ONE[::2], "sweep=1,3"])).rows
    assert chosen() == {"connector": 1.0}
    rates = [
        recipes.load_recipe(row.overrides_for_seed(5)).stages["chat"].trained_parts["connector"].lr,
        recipes.load_recipe(list(ONE[:1])).stages["chat"].trained_parts["connector"].lr,
    ]
    assert rates[0] == rates[1]


@pytest.mark.parametrize("asked", [[], ["dry_run=true"], ["jobs=slurm"]])
def test_runs_begun_without_a_sweep_are_told_before_its_trials(asked, home, monkeypatch, capsys):
    train(TWO)
    monkeypatch.setattr(compare_command, "_train_unfinished", lambda *_: pytest.fail("trains"))
    assert main(["compare", *TWO, "sweep=1,3", *asked]) == 2
    assert capsys.readouterr().err == (
        "vlbench: c/yivl_llava has runs that were begun without a sweep, so that their rates are "
        "not for it to choose; give a new folder, run=DIR, or leave sweep= out\n"
    )
    assert not Path("c/sweep.json").exists() and not Path("c/array.sh").exists()


def test_runs_of_other_rates_than_those_recorded_are_told_before_the_trials(home, capsys):
    words = [*ONE, "sweep=1,3"]
    try_rates(words, {"yivl_llava": {1: "0.4"}})
    train(words)
    record = Path("c/sweep.json").read_text().replace("1.0", "3.0")
    Path("c/sweep.json").write_text(record.replace('"loss": null', '"loss": 0.4'))
    before = Path("c/sweep.json").read_text()
    assert main(["compare", *words]) == 2
    assert "c/yivl_llava/seed0 was trained with another recipe" in capsys.readouterr().err
    assert Path("c/sweep.json").read_text() == before


def test_a_sweep_is_told_of_the_rows_that_tried(home):
    try_rates([*TWO, "sweep=1,3"], {name: {1: "0.4", 3: "0.5"} for name in names(TWO)})
    train([*TWO, "sweep=1,3"])
    three = ["recipe=yivl_llava,yivl_qformer,yivl_eva", *TWO[1:]]
    train(three)
    assert main(["compare", *three]) == 0
    report = Path("c/report.md").read_text()
    assert "Every row tried" not in report
    assert "yivl_llava and yivl_qformer tried their connector's learning rate times some" in report
    untuned = "No learning rate was tuned for yivl_eva: a rate that suits one connector may cost"
    assert untuned in report
    assert any(one.startswith(untuned) for one in describe_sweep(Path("c")))
    assert main(["compare", *TWO]) == 0  # without that row
    assert "Every row tried its connector's learning rate" in Path("c/report.md").read_text()


def test_a_sweep_of_some_rows_forgets_nothing_of_the_others(home):
    try_rates([*TWO, "sweep=1,3"], {name: {1: "0.4", 3: "0.3"} for name in names(TWO)})
    train([*TWO, "sweep=1,3"])
    assert main(["compare", *ONE, "sweep=1,3"]) == 0
    assert chosen("yivl_qformer") == {"connector": 3.0}
    assert main(["compare", *TWO, "sweep=1,3"]) == 0


def test_a_choice_that_no_run_has_is_not_told_of_runs_without_a_sweep(home):
    try_rates([*TWO, "sweep=1,3"], {name: {1: "0.4", 3: "0.3"} for name in names(TWO)})
    lr_sweep.apply_best_lr(parse_grid([*TWO, "sweep=1,3"]))
    assert main(["compare", *TWO]) == 0  # at the recipes' rates
    train(TWO)
    assert main(["compare", *TWO]) == 0
    report = Path("c/report.md").read_text()
    assert "is taken" not in report and "No learning rate was tuned: a rate" in report


@pytest.mark.parametrize(
    "text", ["{}x", '{"rows": 3}', '{"seed": 4, "rows": {"a": {"trials": [], "chosen": {"b": 1}}}}']
)
def test_what_is_no_record_is_named(text, home):
    Path("c").mkdir(exist_ok=True)
    Path("c/sweep.json").write_text(text)
    with pytest.raises(UserError, match=r"sweep\.json"):
        describe_sweep(Path("c"), ["a"])


def names(words: list[str]) -> list[str]:
    return [row.name for row in parse_grid(words).rows]
