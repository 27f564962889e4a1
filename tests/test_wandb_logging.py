"""Which run at Weights & Biases a run folder logs to."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from vlbench.__main__ import main
from vlbench.compare.report.finished_runs import _load_versions
from vlbench.config.schema import LoggingConfig
from vlbench.train.lightning_trainer import build_loggers
from vlbench.train.run_folder import RunFolder


@pytest.fixture(autouse=True)
def wandb_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Lightning's logger, which needs wandb, return what it is given."""
    monkeypatch.setattr("lightning.pytorch.loggers.WandbLogger", lambda **given: given)


def start(folder: Path) -> dict[str, Any]:
    """Return what the logger is given when a run begins or goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    config = LoggingConfig(wandb="connectors", tensorboard=False)
    (logger,) = build_loggers(config, RunFolder(folder), 0)
    return logger  # type: ignore[return-value]


def test_runs_of_one_name_do_not_mix_and_one_that_goes_on_keeps_its_id(tmp_path: Path) -> None:
    here, there = (tmp_path / place / "yivl_llava-6b-1" for place in ("here", "there"))
    first, second = start(here), start(there)
    assert first["id"] != second["id"]
    assert first["name"] == second["name"] == "yivl_llava-6b-1"
    assert (start(here), start(there)) == (first, second)


def test_a_run_that_has_logged_under_its_name_goes_on_there(tmp_path: Path) -> None:
    folder = tmp_path / "my-run-2"
    for name in ("run-20250101_101500-my-run-2", "offline-run-20250102_101500-my-run-2"):
        (folder / "wandb" / name).mkdir(parents=True)
    (folder / "wandb/latest-run").mkdir()
    assert start(folder)["id"] == start(folder)["id"] == "my-run-2"


def test_the_id_is_no_version_that_runs_differ_in(tmp_path: Path) -> None:
    start(tmp_path)
    assert _load_versions(tmp_path, {}) == {}


@pytest.mark.parametrize("word", ["dry_run=true", "seed=0"])
def test_without_wandb_a_run_is_refused_before_it_begins(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    run = tmp_path / "run"
    assert main(["fit", "recipe=yivl_llava", f"run={run}", "log.wandb=mine", word]) == 2
    assert "log.wandb=mine needs: pip install wandb" in capsys.readouterr().err
    assert not run.exists()
