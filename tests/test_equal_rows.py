"""Rows that `match=` or a sweep makes the same experiment are refused before any training."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_run_jobs import finish

from vlbench.__main__ import main
from vlbench.compare.experiment import compare_command, cost_estimate, lr_sweep
from vlbench.compare.experiment.grid import parse_grid
from vlbench.config import recipe as recipes

RATES = "grid=stages.chat.train.connector.lr=1e-3 | stages.chat.train.connector.lr=3e-3"
SWEEP = ["compare", "recipe=yivl_llava", RATES, "run=c", "seeds=1", "sweep=1,3"]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cost_estimate, "_probe_run", lambda *_: None)
    return tmp_path


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(compare_command, "_train_unfinished", lambda *_: pytest.fail("trains"))


def test_rows_that_get_the_same_sizes_are_refused(home, no_training, capsys):
    for pool in (1, 2):
        words = ["recipe=yivl_llava", "connector.name=avgpool", f"connector.pool={pool}"]
        recipes.save_recipe(recipes.load_recipe(words), home / f"pool{pool}.yaml")
    rows = "recipe=pool1.yaml,pool2.yaml"
    assert main(["compare", rows, "run=c", "match=visual_tokens"]) == 2
    assert capsys.readouterr().err == (
        "vlbench: rows pool1 and pool2 are the same experiment: match=visual_tokens has made their "
        "recipes equal; leave one of them out\n"
    )
    assert not Path("c").exists()
    assert main(["compare", rows, "run=c", "dry_run=true"]) == 0  # as they are, they differ


def test_rows_that_a_sweep_may_give_the_same_rates_are_refused(home, no_training, capsys):
    assert main([*SWEEP, "only=chat"]) == 2
    assert capsys.readouterr().err == (
        "vlbench: rows connector.lr=1e-3 and connector.lr=3e-3 are the same experiment at rates "
        "that the sweep may take for both (connector.lr=1e-3 x 3, connector.lr=3e-3 x 1); leave "
        "one of them out\n"
    )
    assert not Path("c").exists()
    assert main([*SWEEP, "dry_run=true"]) == 0  # rates of the other stages differ
    assert main([*SWEEP[:-1], "sweep=1,2", "only=chat", "dry_run=true"]) == 0  # never the same


def test_rows_whose_runs_were_begun_with_other_rates_go_on(home, monkeypatch):
    """What they keep is not the same, whatever could have been."""
    from test_report_command import run

    grid = parse_grid([*SWEEP[1:], "only=chat"])
    grid.folder.mkdir()
    (grid.folder / "command.txt").write_text("python -m vlbench compare\n")
    for row, losses in zip(grid.rows, (("0.1", "0.2"), ("0.2", "0.1")), strict=True):
        for factor, loss in zip((1.0, 3.0), losses, strict=True):
            finish(lr_sweep.trial_folder(grid, row, {"connector": factor}), loss)
    for row in lr_sweep.apply_best_lr(grid).rows:
        run(grid.run_folder(row, 0), 0.8, 0, *row.overrides)
    monkeypatch.setattr(compare_command, "_train_unfinished", lambda *_: {})
    assert main([*SWEEP, "only=chat"]) == 0
